//! What a worker shows of itself on its port for operators.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use serde_json::json;
use strata_proto::port::admin::Admin;

use crate::{
    LocalWorker,
    meter::{Meter, Seen},
};

/// A step that takes so long does not end any more.
const STANDS_STILL: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfDevice {
    device: String,
}

type Seconds = Counter<f64, AtomicU64>;
/// A metric of devices: its name, what it is, and how it is read.
type OfMeter = (&'static str, &'static str, fn(&Meter) -> &AtomicU64);
type OfSeen = (&'static str, &'static str, fn(&Seen<'_>) -> u64);

impl Admin for LocalWorker {
    fn metrics(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.measured())?;
        Ok(out)
    }

    fn live(&self) -> Result<(), String> {
        let still = |device: &str| format!("a step on {device} has not ended for {STANDS_STILL:?}");
        match self.devices().find(|device| device.step_since.is_some_and(|since| since > STANDS_STILL)) {
            Some(device) => Err(still(device.id)),
            None => Ok(()),
        }
    }

    fn started(&self) -> Result<(), String> {
        // It is there when its devices are.
        Ok(())
    }

    fn ready(&self) -> Result<(), String> {
        if self.is_draining() { Err("the worker is about to end".into()) } else { Ok(()) }
    }

    fn status(&self) -> BoxFuture<'_, String> {
        let devices = self.devices().map(|device| {
            json!({
                "device": device.id,
                "occupied": device.is_occupied,
                "weight_bytes": device.weights,
                "allocated_bytes": device.allocated,
                "steps": device.meter.steps.load(Ordering::Relaxed),
            })
        });
        let status = json!({
            "draining": self.is_draining(),
            "devices": devices.collect::<Vec<_>>(),
            "resident": self.resident().borrow().iter().map(|spec| {
                let layers = spec.layers.unwrap_or_default();
                json!({"model": spec.model, "device": spec.device, "layers": [layers.first, layers.end]})
            }).collect::<Vec<_>>(),
        });
        async move { status.to_string() }.boxed()
    }

    fn plan(&self) -> Option<String> {
        None
    }
}

impl LocalWorker {
    fn measured(&self) -> Registry {
        let mut registry = Registry::default();
        let counters: [OfMeter; 5] = [
            ("steps", "Steps that were computed", |meter| &meter.steps),
            ("poisoned_steps", "Steps that failed, here or before", |meter| &meter.poisoned),
            ("tokens", "Tokens of those steps", |meter| &meter.tokens),
            ("received_bytes", "Bytes of activations from the stage before", |meter| &meter.received),
            ("sent_bytes", "Bytes of activations to the stage behind", |meter| &meter.sent),
        ];
        for (name, help, of) in counters {
            let family = Family::<OfDevice, Counter>::default();
            for device in self.devices() {
                let count = of(&device.meter).load(Ordering::Relaxed);
                family.get_or_create(&label(device.id)).inc_by(count);
            }
            registry.register(format!("strata_device_{name}"), help, family);
        }
        let times: [OfMeter; 3] = [
            ("busy_seconds", "Time that it computed", |meter| &meter.busy),
            ("waiting_seconds", "Time that it waited for the stage before", |meter| &meter.waiting),
            ("sending_seconds", "Time that the stage behind kept it", |meter| &meter.sending),
        ];
        for (name, help, of) in times {
            let family = Family::<OfDevice, Seconds>::default();
            for device in self.devices() {
                let time = of(&device.meter).load(Ordering::Relaxed) as f64 / 1e6;
                family.get_or_create(&label(device.id)).inc_by(time);
            }
            registry.register(format!("strata_device_{name}"), help, family);
        }
        let gauges: [OfSeen; 3] = [
            ("occupied", "1 while a stage runs on it", |device| device.is_occupied.into()),
            ("weight_bytes", "Bytes of weights that it holds", |device| device.weights),
            ("allocated_bytes", "Bytes of cache and scratch that it holds", |device| device.allocated),
        ];
        for (name, help, of) in gauges {
            let family = Family::<OfDevice, Gauge>::default();
            for device in self.devices() {
                family.get_or_create(&label(device.id)).set(i64::try_from(of(&device)).unwrap_or(i64::MAX));
            }
            registry.register(format!("strata_device_{name}"), help, family);
        }
        let draining = Gauge::<i64>::default();
        draining.set(self.is_draining().into());
        registry.register("strata_worker_draining", "1 while the worker is about to end", draining);
        registry
    }
}

fn label(device: &str) -> OfDevice {
    OfDevice { device: device.to_owned() }
}
