//! The Hugging Face hub over HTTP: what a revision of a model holds, and the bytes of its files.

use std::{ffi::OsString, fs, io::Read, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use strata_proto::error::quoted;
use tonic::Code;
use ureq::{
    Agent, Body,
    http::{
        HeaderValue, Response, StatusCode, Uri,
        header::{AUTHORIZATION, CONTENT_RANGE, LOCATION, RANGE, RETRY_AFTER},
    },
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::listing::{self, Listing, RemoteFile};
use crate::{call_error::CallError, report::misused};

/// Largest list of a repository's files.
const MAX_LISTING: u64 = 32 << 20;
/// Most redirections of one request: the hub's own to where the file lies, and a renamed repository's.
const MAX_REDIRECTS: usize = 5;
/// How long nothing may come.
const PATIENCE: Duration = Duration::from_secs(60);

/// The hub, or what stands in for it.
pub struct Hub {
    agent: Agent,
    /// Scheme and host, without a slash at the end.
    endpoint: String,
    token: Option<Token>,
}

struct Token {
    header: HeaderValue,
    /// Where it was found.
    from: String,
}

impl Hub {
    /// The hub as the environment describes it to its clients: `HF_ENDPOINT`, a token, proxies.
    ///
    /// # Errors
    /// If the environment forbids to ask it, or what it says cannot be used.
    pub fn new(variable: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
            let value = set(name).map(|value| value.to_string_lossy().to_uppercase());
            if value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str())) {
                bail!("{name} is set: nothing is downloaded; unset it, or serve what the cache has already");
            }
        }
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = endpoint.to_string_lossy().trim_end_matches('/').to_owned();
        let is_address = endpoint.parse::<Uri>().is_ok_and(|uri| {
            uri.host().is_some()
                && matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.query().is_none()
        });
        if !is_address {
            return Err(misused(format!(
                "HF_ENDPOINT={}: expected an address such as https://huggingface.co",
                quoted(&endpoint)
            )));
        }
        let roots: Vec<_> = rustls_native_certs::load_native_certs()
            .certs
            .iter()
            .map(|certificate| Certificate::from_der(certificate).to_owned())
            .collect();
        if roots.is_empty() && endpoint.starts_with("https:") {
            bail!(
                "this system has no certificates to know the hub by: install them (on Debian: apt-get install \
                 ca-certificates), or name a file of them in SSL_CERT_FILE"
            );
        }
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(RootCerts::new_with_certs(&roots)).build())
            .http_status_as_error(false)
            // Followed here: the token is for the hub alone.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .user_agent(format!("strata/{}", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Ok(Hub { agent, endpoint, token: token(set)? })
    }

    /// The files of a model's revision.
    ///
    /// # Errors
    /// If there is none, the hub wants a token, or does not answer as it should.
    pub fn list(&self, id: &str, revision: &str) -> anyhow::Result<Listing> {
        let path = format!("/api/models/{id}/revision/{}?blobs=true", escaped(revision, ""));
        let mut response = self.get(&path, 0)?;
        if !response.status().is_success() {
            return Err(self.refused(&response, id, &format!("revision {revision}")));
        }
        let mut text = Vec::new();
        let body = response.body_mut().as_reader().take(MAX_LISTING + 1).read_to_end(&mut text);
        body.map_err(|e| self.silent(&ureq::Error::from(e)))?;
        if text.len() as u64 > MAX_LISTING {
            bail!("{id}: its list of files is longer than {MAX_LISTING} bytes");
        }
        listing::read(&text).with_context(|| format!("{id}: what {} says of it", self.endpoint))
    }

    /// The bytes of a file from some on; whether they do begin there, or at its first.
    ///
    /// # Errors
    /// If the hub refuses, or does not answer as it should.
    pub fn open(
        &self,
        id: &str,
        commit: &str,
        file: &RemoteFile,
        from: u64,
    ) -> anyhow::Result<(impl Read + use<>, bool)> {
        let response = self.get(&format!("/{id}/resolve/{commit}/{}", escaped(&file.name, "/")), from)?;
        let is_rest = response.status() == StatusCode::PARTIAL_CONTENT;
        if !response.status().is_success() {
            return Err(self.refused(&response, id, &file.name));
        }
        let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
        if is_rest && !range.is_some_and(|range| range.starts_with(&format!("bytes {from}-"))) {
            bail!("{id}: {}: asked for its bytes from {from} on, and {range:?} came", file.name);
        }
        Ok((response.into_body().into_reader(), is_rest))
    }

    /// Asks for a path of the hub, and goes where it says.
    fn get(&self, path: &str, from: u64) -> anyhow::Result<Response<Body>> {
        let mut url = format!("{}{path}", self.endpoint);
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&url);
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                request = request.header(AUTHORIZATION, token.header.clone());
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let response = request.call().map_err(|e| self.silent(&e))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location =
                response.headers().get(LOCATION).and_then(|to| to.to_str().ok()).unwrap_or_default();
            let next = match location.starts_with('/') && !location.starts_with("//") {
                true => format!("{}{location}", origin(&url).unwrap_or_default()),
                false => location.to_owned(),
            };
            let is_open = next.starts_with("http://") && url.starts_with("http://");
            if !next.starts_with("https://") && !is_open {
                bail!("{}: it leads on to {}: expected an https:// address", self.endpoint, quoted(&next));
            }
            url = next;
        }
        bail!("{}: it leads on more than {MAX_REDIRECTS} times", self.endpoint)
    }

    /// The hub did not answer, or broke off.
    fn silent(&self, error: &ureq::Error) -> anyhow::Error {
        let endpoint = &self.endpoint;
        let text = format!(
            "no answer from {endpoint}: {error}; check the network (HTTPS_PROXY names a proxy, HF_ENDPOINT another hub), and pull \
             again: what came is kept"
        );
        CallError { code: Code::Unavailable, text }.into()
    }

    /// The hub answered otherwise than by what was asked for.
    fn refused(&self, response: &Response<Body>, id: &str, what: &str) -> anyhow::Error {
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
        let (endpoint, status) = (&self.endpoint, response.status());
        let (code, text) = match (status.as_u16(), header("x-error-code").unwrap_or_default()) {
            (401 | 403, "GatedRepo") => {
                let how = match &self.token {
                    Some(token) => format!("with the account of the token in {}", token.from),
                    None => {
                        "with your account, and give its token in HF_TOKEN (or by `hf auth login`)".into()
                    }
                };
                (Code::PermissionDenied, format!("it is gated: accept its licence at {endpoint}/{id} {how}"))
            }
            (_, "RevisionNotFound") | (404, "EntryNotFound") => {
                (Code::NotFound, format!("{endpoint} has the model, but no {what}"))
            }
            (401 | 403, _) | (404, _) => {
                let how = match &self.token {
                    Some(token) => format!("that the token in {} is valid and may read it", token.from),
                    None => {
                        "if it is private, that HF_TOKEN is its owner's token (or `hf auth login`)".into()
                    }
                };
                let code =
                    if status == StatusCode::NOT_FOUND { Code::NotFound } else { Code::PermissionDenied };
                (code, format!("{endpoint} has no such model for you ({status}): check the name, and {how}"))
            }
            (429, _) => {
                let wait = response.headers().get(RETRY_AFTER).and_then(|wait| wait.to_str().ok());
                let wait = wait.map_or("later".into(), |wait| format!("in {} s", quoted(wait)));
                (Code::ResourceExhausted, format!("{endpoint} has had too many requests: try again {wait}"))
            }
            (500.., _) => {
                (Code::Unavailable, format!("{endpoint} failed ({status}) at {what}: try again later"))
            }
            _ => (Code::FailedPrecondition, format!("{endpoint} answered {status} to {what}")),
        };
        CallError { code, text: format!("{id}: {text}") }.into()
    }
}

/// Scheme and host of an address, with the port.
fn origin(url: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    Some(format!("{}://{}", uri.scheme_str()?, uri.authority()?))
}

/// A text as part of a URL's path; `kept` stay as they are.
fn escaped(text: &str, kept: &str) -> String {
    let escape = |byte: u8| match char::from(byte) {
        c if c.is_ascii_alphanumeric() || "-_.~".contains(c) || kept.contains(c) => c.to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escape).collect()
}

/// A token from where the hub's clients look for one.
fn token(set: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<Option<Token>> {
    let given = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"]
        .into_iter()
        .find_map(|name| Some((name.to_owned(), set(name)?)));
    let (from, text) = match given {
        Some((name, value)) => (name, value.to_string_lossy().into_owned()),
        None => {
            let below = |name: &str, rest: &str| Some(PathBuf::from(set(name)?).join(rest));
            let file = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| below("HF_HOME", "token"));
            let file = file.or_else(|| below("XDG_CACHE_HOME", "huggingface/token"));
            let Some(file) = file.or_else(|| below("HOME", ".cache/huggingface/token")) else {
                return Ok(None);
            };
            // Nobody has to have one.
            let Ok(text) = fs::read_to_string(&file) else { return Ok(None) };
            (file.display().to_string(), text)
        }
    };
    let text = text.trim();
    if text.is_empty() {
        return Ok(None);
    }
    let Ok(mut header) = HeaderValue::from_str(&format!("Bearer {text}")) else {
        return Err(misused(format!("{from}: expected a token of the hub, such as hf_…, in one line")));
    };
    header.set_sensitive(true);
    Ok(Some(Token { header, from }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_where_the_hubs_clients_keep_it_and_is_never_shown() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let of = |given: &[(&str, &str)]| {
            token(|name| given.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value)))
        };
        let path = home.path().to_str().unwrap();
        let found = |given: &[(&str, &str)]| {
            of(given).unwrap().map(|token| token.header.to_str().unwrap().to_owned())
        };
        assert_eq!(found(&[("HF_TOKEN", " hf_set\n"), ("HF_HOME", path)]).unwrap(), "Bearer hf_set");
        assert_eq!(found(&[("HF_HOME", path)]).unwrap(), "Bearer hf_file");
        assert_eq!(found(&[("HF_TOKEN_PATH", &format!("{path}/token"))]).unwrap(), "Bearer hf_file");
        assert_eq!(found(&[("HF_HOME", "/nowhere")]), None);
        let refused = of(&[("HF_TOKEN", "hf_a\nhf_b")]).err().unwrap().to_string();
        assert!(refused.starts_with("HF_TOKEN: ") && !refused.contains("hf_a"), "{refused}");
    }

    #[test]
    fn paths_are_escaped() {
        assert_eq!(escaped("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(escaped("a b/ü?#%", "/"), "a%20b/%C3%BC%3F%23%25");
        assert_eq!(origin("http://a:1/b?c").as_deref(), Some("http://a:1"));
    }
}
