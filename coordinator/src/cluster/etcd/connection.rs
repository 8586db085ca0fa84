//! Connections to etcd: any endpoint that answers, calls with a bound, and pauses between tries.

use std::{future::Future, time::Duration};

use etcd_client::{Client, GetOptions};
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::sync::watch;

use super::{config::Etcd, error::EtcdError};

/// How long a call may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an endpoint may take to be connected to and to answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause after the first failure; each further one doubles it.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Asks all endpoints at once; the first that answers a read that needs most of etcd's members is the one. So none that is
/// dead, or cut off from the others, is waited for.
///
/// # Errors
/// If none answers in time, or one says that it will never.
pub(super) async fn connect(etcd: &Etcd) -> Result<Client, EtcdError> {
    let reach = |url: &String| {
        let (url, options, key) = (url.clone(), etcd.options(), etcd.key("led"));
        async move {
            let answered = async {
                let mut client = Client::connect([&url], Some(options)).await?;
                client.get(key, Some(GetOptions::new().with_count_only())).await?;
                Ok(client)
            };
            let outcome = match tokio::time::timeout(CONNECT_TIMEOUT, answered).await {
                Ok(outcome) => outcome.map_err(|error| EtcdError::call("connecting", &error)),
                Err(_) => Err(EtcdError::Timeout { doing: "connecting", limit: CONNECT_TIMEOUT }),
            };
            (url, outcome)
        }
    };
    let mut tries: FuturesUnordered<_> = etcd.endpoints.iter().map(reach).collect();
    let mut tried = Vec::new();
    while let Some((url, outcome)) = tries.next().await {
        match outcome {
            Ok(client) => return Ok(client),
            Err(error) if error.is_final() => return Err(error),
            Err(EtcdError::Call { why, .. }) => tried.push(format!("{url}: {why}")),
            Err(error) => tried.push(format!("{url}: {error}")),
        }
    }
    Err(EtcdError::Unreachable { tried: tried.join(", ") })
}

/// A call that is given up after [`CALL_TIMEOUT`].
pub(super) async fn call<T>(
    doing: &'static str,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, EtcdError> {
    call_within(CALL_TIMEOUT, doing, call).await
}

/// A call that is given up after `limit`.
pub(super) async fn call_within<T>(
    limit: Duration,
    doing: &'static str,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, EtcdError> {
    match tokio::time::timeout(limit, call).await {
        Ok(outcome) => outcome.map_err(|error| EtcdError::call(doing, &error)),
        Err(_) => Err(EtcdError::Timeout { doing, limit }),
    }
}

/// Resolves when a part is to stop; one whose handle is gone is to stop, too.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Pauses between tries, longer each time and never the same for two processes; and what was said of failures, so that
/// each reason is said once.
#[derive(Debug, Default)]
pub(super) struct Retry {
    failures: u32,
    said: String,
}

impl Retry {
    /// A try succeeded.
    pub fn succeeded(&mut self) {
        if !self.said.is_empty() {
            tracing::info!("etcd answers again");
        }
        *self = Retry::default();
    }

    /// A try failed: says why, if that is new, and waits until the next one is due.
    pub async fn failed(&mut self, what: &str, error: &EtcdError) {
        let why = error.to_string();
        if why != self.said {
            tracing::warn!("{what}: {why}");
            self.said = why;
        }
        let pause = pause(self.failures, random());
        self.failures = self.failures.saturating_add(1);
        tokio::time::sleep(pause).await;
    }
}

/// The pause after so many failures: at least half of what it may be at most, by a `random` number.
fn pause(failures: u32, random: u64) -> Duration {
    let most = SHORTEST_PAUSE.saturating_mul(1 << failures.min(16)).min(LONGEST_PAUSE);
    let half = most / 2;
    half + half.mul_f64((random >> 11) as f64 / (1u64 << 53) as f64)
}

fn random() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_five_seconds_and_differ() {
        for (failures, most) in [(0, 100), (1, 200), (2, 400), (5, 3200), (6, 5000), (1000, 5000)] {
            let most = Duration::from_millis(most);
            assert_eq!(pause(failures, 0), most / 2);
            assert!(pause(failures, u64::MAX) <= most && pause(failures, u64::MAX) > most.mul_f64(0.99));
        }
    }

    #[tokio::test]
    async fn what_was_tried_is_said_of_each_endpoint() {
        // A port that nobody listens on.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let etcd = Etcd::new(std::slice::from_ref(&free), "default", None, super::super::TlsFiles::default())
            .unwrap();
        let said = connect(&etcd).await.err().unwrap().to_string();
        assert!(said.contains(&format!("http://{free}: Connection refused")), "{said}");
    }
}
