//! Keeping weights where a lost stage could go at once.

use std::sync::atomic::Ordering;

use strata_proto::v1::Fence;

use super::{Engine, bring_up::PATIENCE};
use crate::{
    cluster::{
        PipelineError,
        discovery::discover_enough,
        pipeline::Pipeline,
        standbys::{Standby, standbys},
    },
    engine::{messages::Event, replica::Replica},
};

/// The pipeline of what is loaded for none.
pub(super) const NO_PIPELINE: u32 = u32::MAX;

impl Engine {
    /// Looks for devices to hold stages' weights, if plans or members have changed since that was done last and nothing
    /// else is going on.
    pub(super) fn stand_by(&mut self) {
        let is_settled = self.replicas.iter().all(Replica::is_up) && self.changes.is_empty();
        if self.deployment.standbys == 0 || !self.standbys_due || self.standing_by || !is_settled {
            return;
        }
        (self.standbys_due, self.standing_by) = (false, true);
        let plans: Vec<_> = self.replicas.iter().filter_map(|replica| replica.plan.clone()).collect();
        let foreign = self.claim.plans_of_others();
        let incarnation = self.incarnations.fetch_add(1, Ordering::Relaxed) + 1;
        let fence = Fence { term: self.term, pipeline: NO_PIPELINE, incarnation };
        let (members, deployment, profile) =
            (self.plannable(), self.deployment.clone(), self.profile.clone());
        let (events, history) = (self.handle.clone(), self.history.clone());
        tokio::spawn(async move {
            let found = discover_enough(&members, &deployment, Some(&profile), PATIENCE, |_| true).await;
            let (mut standing, mut failed) = (Vec::new(), Vec::new());
            match found {
                Ok(mut found) => {
                    found.leave_out(&foreign);
                    let chosen = standbys(&found, &plans, &deployment);
                    let loads = chosen.into_iter().map(|standby| async {
                        let is_it = |stage: &strata_proto::StagePlan| {
                            (&stage.worker, &stage.device) == (&standby.worker, &standby.device)
                        };
                        let load =
                            Pipeline::preload((&found, &standby.plan), fence, is_it, &|_| {}, &history).await;
                        load.map(|()| standby)
                    });
                    for outcome in futures::future::join_all(loads).await {
                        match outcome {
                            Ok(standby) => standing.push(standby),
                            Err(error) => failed.push(error),
                        }
                    }
                }
                Err(error) => failed.push(error),
            }
            // An engine that has ended needs none.
            let _ = events.send(Event::StoodBy(standing, failed));
        });
    }

    pub(super) fn stood_by(&mut self, standing: Vec<Standby>, failed: Vec<PipelineError>) {
        self.standing_by = false;
        for error in failed {
            tracing::warn!("no standby: {error}");
            if let Some(worker) = error.worker() {
                self.left_out.failed(worker, error.reason(), tokio::time::Instant::now());
                self.standbys_due = true;
            }
        }
        self.show_left_out();
        let shown = standing.into_iter().map(|standby| (standby.worker, standby.device, standby.layers));
        let shown: Vec<_> = shown.collect();
        self.snapshot.send_modify(|s| s.standbys = shown);
    }

    /// The members that there may be plans over now.
    pub(super) fn plannable(&self) -> Vec<crate::cluster::membership::Member> {
        let mut members = self.members.answering();
        members.retain(|member| !self.left_out.has(&member.name, tokio::time::Instant::now()));
        members
    }
}
