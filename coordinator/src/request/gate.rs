//! How many requests are let in at a time, and whose; an overload is an answer, at once.
//!
//! Places are shared by dynamic thresholds (Choudhury and Hahne, 1998): a tenant may take a place while it has fewer
//! than sixteen times as many as are free, a connection while it has fewer than eight times as many. So whoever is alone
//! has nearly all of them, and who has none finds one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::error::AdmissionError;

/// How many times the free places a tenant may have.
const TENANT_SHARE: usize = 16;
/// How many times the free places a connection may have.
const CONNECTION_SHARE: usize = 8;

/// A place among the requests in progress; freed by dropping it.
#[derive(Debug)]
pub(crate) struct Permit {
    inside: Arc<Mutex<Inside>>,
    tenant: Arc<str>,
    connection: u64,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.leave(&self.tenant, self.connection);
    }
}

/// Places that are taken.
#[derive(Debug, Default)]
struct Inside {
    total: usize,
    /// By tenant and connection; what has none is not listed.
    tenants: HashMap<Arc<str>, HashMap<u64, usize>>,
}

impl Inside {
    fn enter(&mut self, limit: usize, tenant: &Arc<str>, connection: u64) -> Result<(), AdmissionError> {
        let free = limit.saturating_sub(self.total);
        if free == 0 {
            return Err(AdmissionError::Overload { limit });
        }
        let connections = self.tenants.get(tenant);
        let of_tenant = connections.map_or(0, |connections| connections.values().sum());
        let of_connection =
            connections.and_then(|connections| connections.get(&connection)).copied().unwrap_or(0);
        for (whose, taken, share) in
            [("tenant", of_tenant, TENANT_SHARE), ("connection", of_connection, CONNECTION_SHARE)]
        {
            if taken >= share.saturating_mul(free) {
                return Err(AdmissionError::Share { whose, taken, limit });
            }
        }
        self.total += 1;
        *self.tenants.entry(tenant.clone()).or_default().entry(connection).or_default() += 1;
        Ok(())
    }

    fn leave(&mut self, tenant: &Arc<str>, connection: u64) {
        self.total -= 1;
        let Some(connections) = self.tenants.get_mut(tenant) else { return };
        if let Some(taken) = connections.get_mut(&connection) {
            *taken -= 1;
        }
        connections.retain(|_, taken| *taken > 0);
        if connections.is_empty() {
            self.tenants.remove(tenant);
        }
    }
}

/// Bounds the number of requests in progress.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    inside: Arc<Mutex<Inside>>,
    limit: usize,
}

impl Gate {
    /// A gate for `limit` requests at a time.
    pub fn new(limit: usize) -> Self {
        Gate { inside: Arc::default(), limit }
    }

    /// A place for a request of a tenant that came by a connection, or the answer that there is none.
    ///
    /// # Errors
    /// [`AdmissionError::Overload`] at once if every place is taken, [`AdmissionError::Share`] if those that are left
    /// are for others.
    pub fn enter(&self, tenant: &Arc<str>, connection: u64) -> Result<Permit, AdmissionError> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).enter(self.limit, tenant, connection)?;
        Ok(Permit { inside: self.inside.clone(), tenant: tenant.clone(), connection })
    }
}

#[cfg(test)]
mod tests {
    use strata_proto::error::{Classify, Kind};

    use super::*;

    #[test]
    fn the_gate_frees_by_drop() {
        let gate = Gate::new(1);
        let permit = gate.enter(&"".into(), 0).unwrap();
        assert!(matches!(gate.enter(&"".into(), 0).unwrap_err().kind(), Kind::Overload { .. }));
        drop(permit);
        gate.enter(&"".into(), 0).unwrap();
        assert!(gate.inside.lock().unwrap().tenants.is_empty(), "nobody who left is remembered");
    }

    #[test]
    fn whoever_is_alone_has_nearly_all_places_and_others_find_one() {
        let gate = Gate::new(512);
        let fill = |tenant: &str, connection: u64| -> Vec<Permit> {
            let tenant = tenant.into();
            std::iter::from_fn(|| gate.enter(&tenant, connection).ok()).collect()
        };
        let burst = fill("a", 1);
        assert_eq!(burst.len(), 456);
        let refused = gate.enter(&"a".into(), 1).unwrap_err();
        assert!(matches!(refused.kind(), Kind::Overload { .. }));
        assert!(refused.to_string().contains("456 requests of this connection"), "{refused}");
        let second = fill("a", 2);
        assert!(second.len() > 20, "{} for another connection", second.len());
        assert!(gate.enter(&"a".into(), 3).unwrap_err().to_string().contains("of this tenant"));
        let other = fill("b", 4);
        assert!(other.len() > 20, "{} for another tenant", other.len());
        assert!(gate.enter(&"c".into(), 5).is_ok(), "there is a place for one more");
        drop((burst, second, other));
        assert_eq!(fill("a", 1).len(), 456);
        for limit in 1..8 {
            let gate = Gate::new(limit);
            let permits: Vec<_> = std::iter::from_fn(|| gate.enter(&"a".into(), 1).ok()).collect();
            assert_eq!(permits.len(), limit, "few places are not divided");
        }
    }
}
