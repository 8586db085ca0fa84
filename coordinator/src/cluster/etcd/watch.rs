//! Watching keys from a revision on, without being fooled by silence.

use std::time::Duration;

use etcd_client::{Client, Event, WatchOptions, WatchStream};

use super::{connection::call, error::EtcdError};

/// Silence after which etcd is asked for a sign of life, and after which a watch that has given none has ended.
const SILENCE: Duration = Duration::from_secs(2);

/// A watch of the keys that begin with a prefix. Whatever ends it, whoever watches reads everything again and begins anew
/// from there: watches do not resume, and etcd may have forgotten what happened since.
pub(super) struct Watcher {
    stream: WatchStream,
    /// Whether a sign of life is due.
    asked: bool,
}

impl Watcher {
    /// Watches what changes after `revision`.
    ///
    /// # Errors
    /// If etcd does not begin in time.
    pub async fn start(client: &mut Client, prefix: String, revision: i64) -> Result<Self, EtcdError> {
        let options = WatchOptions::new().with_prefix().with_start_revision(revision + 1);
        let stream = call("watching", client.watch(prefix, Some(options))).await?;
        Ok(Watcher { stream, asked: false })
    }

    /// The next changes. Safe to drop while it waits.
    ///
    /// # Errors
    /// If the watch has ended: the connection broke, etcd gave no sign of life, or has forgotten the revision.
    pub async fn next(&mut self) -> Result<Vec<Event>, EtcdError> {
        let failed = |error| EtcdError::call("watching", &error);
        loop {
            let Ok(message) = tokio::time::timeout(SILENCE, self.stream.message()).await else {
                if self.asked {
                    return Err(EtcdError::Timeout { doing: "watching", limit: 2 * SILENCE });
                }
                // What revision the answer names is not used: etcd before 3.5.8 may name one whose events are still to come.
                self.stream.request_progress().await.map_err(failed)?;
                self.asked = true;
                continue;
            };
            self.asked = false;
            let message =
                message.map_err(failed)?.ok_or_else(|| EtcdError::WatchEnded("the stream ended".into()))?;
            // On a stream that stays open, and after compaction without a reason.
            if message.canceled() {
                return Err(EtcdError::WatchEnded(match message.compact_revision() {
                    0 => message.cancel_reason().to_owned(),
                    compacted => format!("revision {compacted} is the oldest that it remembers"),
                }));
            }
            if !message.events().is_empty() {
                return Ok(message.events().to_vec());
            }
        }
    }
}
