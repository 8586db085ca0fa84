//! Where a server is, as people write it.

/// The URL of an address, which may leave `http://` out.
///
/// # Errors
/// For a scheme that is not spoken; the text begins with why, and leaves to the caller to say whose address it is.
pub fn http_url(address: &str) -> Result<String, String> {
    match address.split_once("://") {
        None => Ok(format!("http://{address}")),
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => Ok(format!("http://{rest}")),
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => {
            Err("Strata has no TLS yet: reach the server by http://, over a network that nobody else reads"
                .into())
        }
        Some(_) => Err("expected a URL such as http://10.0.0.7:7717".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_of_http_in_any_case() {
        for given in ["a:1", "http://a:1", "HTTP://a:1"] {
            assert_eq!(http_url(given).unwrap(), "http://a:1");
        }
        assert!(http_url("HTTPS://a:1").unwrap_err().contains("no TLS"));
        assert!(http_url("ftp://a:1").unwrap_err().contains("expected a URL"));
    }
}
