//! Reaching a server.

use std::{error::Error, future::Future, time::Duration};

use strata_proto::{CLIENT_PING_EVERY, CLIENT_PING_TIMEOUT, MAX_HEADER_LIST, error::root, http_url};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{args::AddressArgs, call_error::CallError, report::misused};

/// How long connecting may take, unless told otherwise.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A server that was reached.
#[derive(Debug, Clone)]
pub struct Server {
    /// For clients of its services.
    pub channel: Channel,
    address: String,
    timeout: Option<Duration>,
}

impl Server {
    /// Connects to a server.
    ///
    /// # Errors
    /// A [`CallError`] if nobody answers in time; something else if the address cannot be one.
    pub async fn connect(args: &AddressArgs) -> anyhow::Result<Self> {
        let address = args.address.as_str();
        let url = http_url(address).map_err(|why| misused(format!("--address {address}: {why}")))?;
        let endpoint = Endpoint::from_shared(url)
            .map_err(|why| misused(format!("--address {address:?}: {}", root(&why))))?;
        let timeout = args.timeout.map(Duration::from_secs);
        let limit = timeout.unwrap_or(CONNECT_TIMEOUT);
        let endpoint = endpoint
            .connect_timeout(limit)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(CLIENT_PING_EVERY)
            .keep_alive_timeout(CLIENT_PING_TIMEOUT)
            .http2_max_header_list_size(MAX_HEADER_LIST);
        // The endpoint's own limit leaves the lookup of a name out.
        let connected = match tokio::time::timeout(limit, endpoint.connect()).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(root(&error)),
            Err(_) => Err(format!("no connection within {limit:?}")),
        };
        match connected {
            Ok(channel) => Ok(Server { channel, address: address.to_owned(), timeout }),
            Err(why) => Err(unavailable(format!(
                "no server answers at {address}: {why}; is `strata serve` running? (--address, --timeout)"
            ))),
        }
    }

    /// What a call comes to, or the next message of an answer.
    ///
    /// # Errors
    /// A [`CallError`] if it is refused, the connection is lost, or nothing comes within `--timeout`.
    pub async fn wait<T>(&self, asked: impl Future<Output = Result<T, Status>>) -> anyhow::Result<T> {
        let outcome = match self.timeout {
            None => asked.await,
            Some(limit) => match tokio::time::timeout(limit, asked).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    return Err(CallError {
                        code: Code::DeadlineExceeded,
                        text: format!(
                            "nothing came from {} for {limit:?}; --timeout can be longer",
                            self.address
                        ),
                    }
                    .into());
                }
            },
        };
        outcome.map_err(|status| match status.source() {
            // Not the server's words, but what became of the connection.
            Some(why) => unavailable(format!(
                "the connection to {} broke: {}; is it a Strata server, and still running?",
                self.address,
                root(why)
            )),
            None => {
                CallError { code: status.code(), text: format!("{} ({:?})", status.message(), status.code()) }
                    .into()
            }
        })
    }
}

/// A server that does not answer, or not yet.
pub fn unavailable(text: String) -> anyhow::Error {
    CallError { code: Code::Unavailable, text }.into()
}
