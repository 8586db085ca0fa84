//! The two forms in which metrics are read: OpenMetrics, which Prometheus asks for, and the text of Prometheus before it, which
//! everything else reads.

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metrics in the form that is asked for, with its media type; `text` has them in OpenMetrics.
pub(super) fn answer(accept: &str, text: String) -> (&'static str, String) {
    match prefers_open_metrics(accept) {
        true => (OPEN_METRICS, text),
        false => (PLAIN, plain(&text)),
    }
}

/// Whether a header Accept asks for OpenMetrics at least as much as for plain text (RFC 9110, section 12.5.1).
fn prefers_open_metrics(accept: &str) -> bool {
    let weight = |wanted: &str| -> Option<f32> {
        accept.split(',').find_map(|kind| {
            let mut parts = kind.split(';').map(str::trim);
            if !parts.next()?.eq_ignore_ascii_case(wanted) {
                return None;
            }
            Some(parts.find_map(|part| part.strip_prefix("q=")?.parse().ok()).unwrap_or(1.0))
        })
    };
    weight("application/openmetrics-text")
        .is_some_and(|open| open > 0.0 && open >= weight("text/plain").unwrap_or(0.0))
}

/// The same in the form before OpenMetrics: counters are named in full, and there are no exemplars, units and no end.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut help = None;
    for line in text.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = Some(described);
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", kind),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                _ => ("", kind),
            };
            if let Some(text) = help.take().and_then(|help| help.strip_prefix(name)) {
                out.extend(["# HELP ", name, suffix, text, "\n"]);
            }
            out.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            let (labelled, rest) = line.split_at(labels_end(line));
            let value = rest.split(" # ").next().unwrap_or_default();
            out.extend([labelled, value, "\n"]);
        }
    }
    out
}

/// Where the labels of a sample end, whose values may hold anything.
fn labels_end(sample: &str) -> usize {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in sample.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return at + 1,
            b' ' if !quoted => return at,
            _ => {}
        }
    }
    sample.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_the_one_that_is_asked_for() {
        let prometheus_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                            text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        let prometheus_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;\
                            escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3";
        for open in [prometheus_2, prometheus_3, "application/openmetrics-text"] {
            assert!(prefers_open_metrics(open), "{open}");
        }
        let plainer = "application/openmetrics-text;q=0.1, text/plain;q=0.9";
        for other in ["", "*/*", "text/plain", plainer, "application/openmetrics-text;q=0"] {
            assert!(!prefers_open_metrics(other), "{other}");
        }
    }

    #[test]
    fn plain_text_has_whole_names_and_no_exemplars() {
        let open = "# HELP vllm:prompt_tokens Read.\n# TYPE vllm:prompt_tokens counter\n\
                    vllm:prompt_tokens_total{model_name=\"a # {b\"} 3\n\
                    # HELP wait_seconds Waited.\n# TYPE wait_seconds histogram\n# UNIT wait_seconds seconds\n\
                    wait_seconds_bucket{le=\"1.0\"} 1 # {request_id=\"x\"} 0.5\n# TYPE strata_build info\n\
                    strata_build_info{version=\"1\"} 1\n# EOF\n";
        let expected = "# HELP vllm:prompt_tokens_total Read.\n# TYPE vllm:prompt_tokens_total counter\n\
                        vllm:prompt_tokens_total{model_name=\"a # {b\"} 3\n\
                        # HELP wait_seconds Waited.\n# TYPE wait_seconds histogram\n\
                        wait_seconds_bucket{le=\"1.0\"} 1\n# TYPE strata_build_info gauge\n\
                        strata_build_info{version=\"1\"} 1\n";
        assert_eq!(plain(open), expected);
    }
}
