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

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        net::TcpListener,
        process::{Command, Stdio},
    };

    use super::*;
    use crate::cluster::etcd::{Etcd, TlsFiles, connection::connect};

    #[tokio::test]
    async fn a_revision_that_etcd_has_forgotten_ends_a_watch_at_once() {
        let directory = std::env::temp_dir().join(format!("strata-watch-{}", uuid::Uuid::new_v4()));
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [url, peer] = ports.each_ref().map(|port| format!("http://{}", port.local_addr().unwrap()));
        drop(ports);
        let started = Command::new("etcd")
            .arg("--data-dir")
            .arg(&directory)
            .args(["--listen-client-urls", &url, "--advertise-client-urls", &url])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap", "--unsafe-no-fsync"])
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut server) = started else {
            assert!(std::env::var_os("CI").is_none(), "in CI nothing is skipped: etcd is needed");
            return eprintln!("SKIPPED: etcd is needed; tests/run installs it");
        };
        let mut log = BufReader::new(server.stderr.take().unwrap()).lines().map_while(Result::ok);
        assert!(log.any(|line| line.contains("serving client traffic")), "etcd does not start");

        let etcd = Etcd::new(&[url], "default", None, TlsFiles::default()).unwrap();
        let Ok(mut client) = connect(&etcd).await else { panic!("etcd does not answer") };
        let mut last = 0;
        for _ in 0..3 {
            last = client.put("/a", "", None).await.unwrap().header().unwrap().revision();
        }
        client.compact(last, None).await.unwrap();
        let ended = Watcher::start(&mut client, "/".into(), 1).await.unwrap().next().await.unwrap_err();
        assert_eq!(
            ended.to_string(),
            format!("etcd has ended a watch: revision {last} is the oldest that it remembers")
        );
        // Silence is asked about, and an answer to that is no end: longer than two silences nothing happens.
        let mut watcher = Watcher::start(&mut client, "/".into(), last).await.unwrap();
        tokio::time::timeout(3 * SILENCE, watcher.next()).await.expect_err("nothing has changed");
        let _ = server.kill();
        let _ = server.wait();
        let _ = std::fs::remove_dir_all(directory);
    }
}
