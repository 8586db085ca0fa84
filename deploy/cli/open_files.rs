//! How many files, connections among them, this process may have open.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::report;

/// Files that a server has open beside connections of clients: the model's, its workers', the log's.
const BESIDE: u64 = 256;

/// Raises the limit as far as this process may by itself, and warns if `connections` are more than it allows even so.
pub fn raise(connections: u64) {
    let mut limit = getrlimit(Resource::Nofile);
    let before = limit.current;
    limit.current = limit.maximum;
    // Where it may not be raised, what there is has to do, or is warned of.
    let allowed = match setrlimit(Resource::Nofile, limit) {
        Ok(()) => limit.maximum,
        Err(_) => before,
    };
    if let Some(warning) = too_few(allowed, connections) {
        report::warn(&warning);
    }
}

/// What there is to say of `allowed` open files, if they are too few. None is as many as one likes.
fn too_few(allowed: Option<u64>, connections: u64) -> Option<String> {
    let needed = connections + BESIDE;
    let allowed = allowed.filter(|allowed| *allowed < needed)?;
    Some(format!(
        "this process may open {allowed} files (ulimit -n), and --max-connections {connections} needs {needed}: raise the \
         one, or lower the other"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_as_far_as_it_goes_and_a_low_one_is_told() {
        raise(1);
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        assert_eq!((too_few(None, 1 << 40), too_few(Some(1280), 1024)), (None, None));
        let warning = too_few(Some(1024), 1024).unwrap();
        assert!(warning.contains("may open 1024 files") && warning.contains("needs 1280"), "{warning}");
    }
}
