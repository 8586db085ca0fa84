//! Which etcd, which cluster in it, and by what rights.

use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use strata_proto::Secret;

use super::error::EtcdError;
use crate::cluster::remote::RemoteWorker;

/// Longest name of a cluster or of a worker, in bytes.
const MAX_NAME: usize = 200;
/// etcd closes connections that ping it more often than every 5 s.
const PING_EVERY: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// A user of etcd.
#[derive(Clone)]
pub struct Credentials {
    /// Its name.
    pub user: String,
    /// Its password.
    pub password: String,
}

/// What TLS needs, in PEM.
#[derive(Clone, Default)]
pub struct TlsFiles {
    /// Who vouches for etcd.
    pub ca: Option<Vec<u8>>,
    /// Certificate and key by which Strata shows itself.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// Where etcd is, and which cluster of Strata's in it is meant.
#[derive(Clone)]
pub struct Etcd {
    pub(super) endpoints: Vec<String>,
    cluster: String,
    credentials: Option<Credentials>,
    tls: Option<TlsOptions>,
    secret: Option<Secret>,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Neither passwords nor keys.
        f.debug_struct("Etcd")
            .field("endpoints", &self.endpoints)
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

impl Etcd {
    /// An etcd at any of `urls`, all of `http://` or all of `https://`; without a scheme, as `tls` is given.
    ///
    /// # Errors
    /// If there is no URL, one has no host, the schemes do not fit each other or `tls`, or the name is not plain.
    pub fn new(
        urls: &[String],
        cluster: &str,
        credentials: Option<Credentials>,
        tls: TlsFiles,
    ) -> Result<Self, EtcdError> {
        let wrong = |what: String| Err(EtcdError::Config(what));
        check_name(cluster).map_err(|why| EtcdError::Config(format!("--cluster {cluster:?}: {why}")))?;
        let has_tls = tls.ca.is_some() || tls.identity.is_some();
        let mut endpoints = Vec::new();
        for url in urls {
            let (scheme, rest) = match url.split_once("://") {
                None if has_tls => ("https".to_owned(), url.as_str()),
                None => ("http".to_owned(), url.as_str()),
                Some((scheme, rest)) => (scheme.to_ascii_lowercase(), rest),
            };
            let address = rest.trim_end_matches('/');
            let has_host =
                address.parse::<tonic::codegen::http::uri::Authority>().is_ok_and(|a| !a.host().is_empty());
            if !["http", "https"].contains(&scheme.as_str()) || !has_host || address.contains('@') {
                return wrong(format!("--etcd {url}: expected a URL such as http://10.0.0.7:2379"));
            }
            let port = if address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
                ""
            } else {
                ":2379"
            };
            endpoints.push(format!("{scheme}://{address}{port}"));
        }
        let secure = endpoints.iter().filter(|url| url.starts_with("https:")).count();
        match (secure, has_tls) {
            _ if endpoints.is_empty() => return wrong("--etcd: expected at least one URL".into()),
            (0, true) => return wrong("--etcd-ca and --etcd-cert need URLs of https://".into()),
            (n, _) if n != 0 && n != endpoints.len() => {
                return wrong("--etcd: expected URLs all of http:// or all of https://".into());
            }
            (n, _) if n != 0 && tls.ca.is_none() => {
                return wrong(
                    "--etcd https://: give --etcd-ca, the certificate of who vouches for etcd".into(),
                );
            }
            _ => {}
        }
        let tls = (secure > 0).then(|| {
            let options = TlsOptions::new().ca_certificates(tls.ca.map(Certificate::from_pem));
            match tls.identity {
                Some((certificate, key)) => options.identity(Identity::from_pem(certificate, key)),
                None => options,
            }
        });
        Ok(Etcd { endpoints, cluster: cluster.to_owned(), credentials, tls, secret: None })
    }

    /// The same, where calls on workers prove this secret.
    pub fn with_secret(self, secret: Option<Secret>) -> Self {
        Etcd { secret, ..self }
    }

    /// A worker at an address that etcd has; also returns its host.
    ///
    /// # Errors
    /// If it is no address.
    pub(super) fn worker(&self, address: &str) -> Result<(RemoteWorker, String), String> {
        let (worker, _, host) = RemoteWorker::lazy(address)?;
        Ok((worker.with_secret(self.secret.clone()), host))
    }

    /// How to connect.
    pub(super) fn options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            // Counted against us without a call in progress, and there always is one.
            .with_keep_alive_while_idle(false)
            // A member that has lost the others answers nothing then, instead of what it remembers.
            .with_require_leader(true);
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.clone());
        }
        if let Some(Credentials { user, password }) = &self.credentials {
            options = options.with_user(user, password).with_auto_token_refresh(true);
        }
        options
    }

    /// A key of this cluster.
    pub(super) fn key(&self, below: &str) -> String {
        format!("/strata/{}/{below}", self.cluster)
    }
}

/// Checks the name of a cluster or of a worker.
///
/// # Errors
/// If it is empty, too long, or has other characters than letters, digits and `. _ - : [ ]`.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-:[]".contains(c);
    match name.len() {
        0 => Err("expected a name".into()),
        length if length > MAX_NAME => Err(format!("{length} characters are too many: at most {MAX_NAME}")),
        _ if name.chars().all(plain) => Ok(()),
        _ => Err("expected letters, digits, and . _ - : [ ] only".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(urls: &[&str], tls: TlsFiles) -> Result<Vec<String>, String> {
        let urls: Vec<_> = urls.iter().map(|&url| url.to_owned()).collect();
        Etcd::new(&urls, "default", None, tls).map(|etcd| etcd.endpoints).map_err(|e| e.to_string())
    }

    #[test]
    fn endpoints_are_urls_of_one_kind() {
        let ca = || TlsFiles { ca: Some(b"pem".to_vec()), identity: None };
        assert_eq!(
            made(&["a", "HTTP://b:1/"], TlsFiles::default()).unwrap(),
            ["http://a:2379", "http://b:1"]
        );
        assert_eq!(made(&["a:1", "https://[::1]"], ca()).unwrap(), ["https://a:1", "https://[::1]:2379"]);
        let refused = |urls: &[&str], tls, why: &str| {
            let said = made(urls, tls).unwrap_err();
            assert!(said.contains(why), "{urls:?}: {said}");
        };
        refused(&[], TlsFiles::default(), "at least one URL");
        refused(&["http://a:1", "https://b:1"], ca(), "all of http:// or all of https://");
        refused(&["https://a:1"], TlsFiles::default(), "give --etcd-ca");
        refused(&["http://a:1"], ca(), "need URLs of https://");
        for bad in ["ftp://a:1", "http://", "", "http://a b", "http://user@a:1"] {
            refused(&[bad], TlsFiles::default(), "expected a URL such as");
        }
    }

    #[test]
    fn names_are_plain_and_keys_are_below_the_cluster() {
        for good in ["default", "10.0.0.7:7801", "[::1]:7801", "gpu_node-3"] {
            check_name(good).unwrap();
        }
        for bad in ["", "a/b", "a b", "ä", "a\n", &"a".repeat(MAX_NAME + 1)] {
            check_name(bad).unwrap_err();
        }
        let etcd = Etcd::new(&["a".to_owned()], "blue", None, TlsFiles::default()).unwrap();
        assert_eq!(etcd.key("workers/a"), "/strata/blue/workers/a");
        let secret = Credentials { user: "root".into(), password: "secret".into() };
        let etcd = Etcd::new(&["a".to_owned()], "blue", Some(secret), TlsFiles::default()).unwrap();
        assert!(!format!("{etcd:?}").contains("secret"));
    }
}
