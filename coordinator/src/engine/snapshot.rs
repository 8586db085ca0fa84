//! What a coordinator shows of itself, from its first moment on.

use std::{collections::BTreeMap, sync::Arc};

use strata_proto::{
    Digest, LayerRange, Plan,
    v1::{self, Fence},
};

/// What a coordinator is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum State {
    /// It waits for workers, or for its turn.
    #[default]
    Standby,
    /// It plans, loads and checks.
    Starting,
    /// Requests are taken; while no pipeline is up they wait for one.
    Serving,
    /// No request is taken any more; those in progress are finished.
    Draining,
}

/// How far a stage has loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loading {
    /// Which pipeline.
    pub pipeline: u32,
    /// Index of the stage in it.
    pub stage: usize,
    /// Worker that loads.
    pub worker: String,
    /// Device of that worker.
    pub device: String,
    /// What it loads.
    pub layers: LayerRange,
    /// Bytes read from files so far.
    pub bytes_read: u64,
    /// Bytes to read in all; 0 while that is unknown.
    pub bytes_total: u64,
}

impl Loading {
    /// How much of it is read, from 0 to 100.
    pub fn percent(&self) -> u64 {
        let total = u128::from(self.bytes_total.max(1));
        (u128::from(self.bytes_read.min(self.bytes_total)) * 100 / total) as u64
    }

    fn is_done(&self) -> bool {
        self.bytes_total > 0 && self.bytes_read >= self.bytes_total
    }
}

/// A coordinator as it was after the last event.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// What it is doing.
    pub state: State,
    /// Which part of its start it is at.
    pub doing: String,
    /// A pipeline is up.
    pub up: bool,
    /// Why none is.
    pub down: String,
    /// Stages of pipelines that are coming up.
    pub loading: Vec<Loading>,
    /// Workers that are left out of plans, or were when something failed on them, and why.
    pub left_out: BTreeMap<String, String>,
    /// The live plan, or the last one.
    pub plan: Option<Arc<Plan>>,
    /// The live incarnation, or the last one.
    pub fence: Fence,
    /// Devices that hold the weights of a stage, in case its own is lost: worker, device and layers.
    pub standbys: Vec<(String, String, LayerRange)>,
    /// Digest of the model's weights, once every part of it was loaded.
    pub weights: Option<Digest>,
    /// Positions that the largest cache of a pipeline holds; 0 while there is none.
    pub capacity: u64,
    /// Counters and gauges, of all pipelines together.
    pub load: v1::Load,
}

impl Snapshot {
    /// Whether requests are taken, and computed at once.
    pub fn ready(&self) -> bool {
        self.state == State::Serving && self.up
    }

    /// There is no engine any more, for this reason: what it counted stays, and nothing of what it did.
    pub(crate) fn engine_ended(&mut self, why: &str) {
        (self.up, self.down, self.capacity) = (false, why.to_owned(), 0);
        self.loading.clear();
        self.load = counters(&self.load);
    }

    /// Why not; empty if they are.
    pub fn reason(&self) -> String {
        match self.state {
            State::Draining => "the server is shutting down".into(),
            State::Serving | State::Starting if self.up => self.doing.clone(),
            State::Standby | State::Starting => self.progress().unwrap_or_else(|| self.doing.clone()),
            State::Serving => match self.progress() {
                Some(progress) if self.down.is_empty() => progress,
                Some(progress) => format!("{}; {progress}", self.down),
                None => self.down.clone(),
            },
        }
    }

    /// What is loaded right now: the stage that has the longest way to go.
    fn progress(&self) -> Option<String> {
        let last = self.loading.iter().min_by_key(|loading| loading.percent())?;
        let Loading { worker, device, layers, .. } = last;
        Some(match last.is_done() {
            true => "setting the stages up".into(),
            false => format!("loading layers {layers} on {worker}/{device}, {} %", last.percent()),
        })
    }
}

/// What an engine counts, without what it shows of the moment.
pub(crate) fn counters(load: &v1::Load) -> v1::Load {
    v1::Load {
        prompt_tokens: load.prompt_tokens,
        generated_tokens: load.generated_tokens,
        preemptions: load.preemptions,
        steps: load.steps,
        prefix_queries: load.prefix_queries,
        prefix_hits: load.prefix_hits,
        ..v1::Load::default()
    }
}

/// What two engines have counted, one after the other.
pub(crate) fn sum(a: &v1::Load, b: &v1::Load) -> v1::Load {
    v1::Load {
        prompt_tokens: a.prompt_tokens + b.prompt_tokens,
        generated_tokens: a.generated_tokens + b.generated_tokens,
        preemptions: a.preemptions + b.preemptions,
        steps: a.steps + b.steps,
        prefix_queries: a.prefix_queries + b.prefix_queries,
        prefix_hits: a.prefix_hits + b.prefix_hits,
        ..v1::Load::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_has_ended_does_nothing_and_has_counted() {
        let load =
            v1::Load { running: 2, steps_in_flight: 1, kv_tokens_used: 64, steps: 9, ..v1::Load::default() };
        let loading = Loading {
            pipeline: 0,
            stage: 0,
            worker: "w".into(),
            device: "cpu".into(),
            layers: LayerRange::new(0, 1),
            bytes_read: 0,
            bytes_total: 0,
        };
        let (state, doing) = (State::Standby, "coordinator b leads".to_owned());
        let loading = vec![loading];
        let mut snapshot =
            Snapshot { state, doing, up: true, capacity: 64, load, loading, ..Snapshot::default() };
        snapshot.engine_ended("it leads no more");
        assert_eq!(
            (snapshot.up, snapshot.capacity, snapshot.reason().as_str()),
            (false, 0, "coordinator b leads")
        );
        assert_eq!(snapshot.load, v1::Load { steps: 9, ..v1::Load::default() });
    }

    #[test]
    fn the_reason_is_what_there_is_to_wait_for() {
        let mut snapshot = Snapshot { doing: "1 of 2 workers are there".into(), ..Snapshot::default() };
        assert_eq!((snapshot.ready(), snapshot.reason().as_str()), (false, "1 of 2 workers are there"));
        let stage = |stage: usize, bytes_read| Loading {
            pipeline: 0,
            stage,
            worker: format!("worker-{stage}"),
            device: "cpu".into(),
            layers: LayerRange::new(12 * stage as u32, 12 * stage as u32 + 12),
            bytes_read,
            bytes_total: 1000,
        };
        snapshot.state = State::Starting;
        snapshot.loading = vec![stage(0, 409), stage(1, 700)];
        assert_eq!(snapshot.reason(), "loading layers 0..12 on worker-0/cpu, 40 %");
        snapshot.loading[0].bytes_read = 1000;
        assert_eq!(snapshot.reason(), "loading layers 12..24 on worker-1/cpu, 70 %");
        snapshot.loading[1].bytes_read = 1000;
        assert_eq!(snapshot.reason(), "setting the stages up");
        // A second copy of the model may still load while the first one is checked, and serves.
        (snapshot.up, snapshot.doing) = (true, "checking the model's output".into());
        assert_eq!((snapshot.ready(), snapshot.reason().as_str()), (false, "checking the model's output"));
        (snapshot.state, snapshot.doing) = (State::Serving, String::new());
        assert_eq!((snapshot.ready(), snapshot.reason().as_str()), (true, ""));
        (snapshot.up, snapshot.down) = (false, "worker worker-1 left".into());
        snapshot.loading = vec![stage(0, 0)];
        let reason = "worker worker-1 left; loading layers 0..12 on worker-0/cpu, 0 %";
        assert_eq!((snapshot.ready(), snapshot.reason().as_str()), (false, reason));
        snapshot.state = State::Draining;
        assert_eq!(snapshot.reason(), "the server is shutting down");
    }
}
