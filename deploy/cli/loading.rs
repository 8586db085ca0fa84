//! A deployment that comes up: bars on a terminal, plain lines in a pipe.

use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use strata_coordinator::engine::Notice;
use strata_proto::Plan;

use crate::{
    report,
    show::{bytes, plan_table, remarks},
    terminal::width,
};

/// Shows a deployment coming up on standard error: bars on a terminal, plain lines in a pipe.
#[derive(Default)]
pub struct Loading {
    /// No plan, and nothing in a pipe but warnings.
    quiet: bool,
    bars: Mutex<Option<Bars>>,
}

struct Bars {
    group: MultiProgress,
    stages: Vec<ProgressBar>,
    plan: Arc<Plan>,
}

impl Loading {
    /// Shows bars and warnings alone.
    pub fn quiet() -> Self {
        Loading { quiet: true, ..Loading::default() }
    }

    /// Takes a notice from the coordinator.
    pub fn show(&self, notice: Notice) {
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        match notice {
            Notice::Waiting(..) | Notice::StandingBy(_) if self.quiet => {}
            Notice::StandingBy(why) => report::tell(&format!("standing by: {why}")),
            Notice::Waiting(joined, expected) => {
                let of = expected.map(|expected| format!(" of {expected}")).unwrap_or_default();
                report::tell_with(&format!("{joined}{of} workers are there"), |fields| {
                    fields.extend([("joined".into(), joined.into()), ("expected".into(), expected.into())]);
                });
            }
            Notice::Planned(plan) => {
                match self.quiet {
                    true => remarks(&plan).for_each(|remark| report::tell(&remark)),
                    false => {
                        report::tell_table(
                            "planned",
                            &plan_table(&plan, width(std::io::stderr())),
                            |fields| {
                                fields.extend(
                                    serde_json::to_value(&*plan).ok().map(|plan| ("plan".into(), plan)),
                                );
                            },
                        );
                    }
                }
                *bars = Some(Bars::new(plan));
            }
            Notice::Checked(findings) => {
                // One that refuses is told by the error that it ends with.
                findings.iter().filter(|f| f.skipped).for_each(|finding| report::tell(&finding.to_string()));
            }
            Notice::Loading(update) => {
                let Some(bars) = &*bars else { return };
                let Some(bar) = bars.bar(update.pipeline, update.stage) else { return };
                bar.set_length(update.bytes_total);
                bar.set_position(update.bytes_read);
                if update.bytes_read >= update.bytes_total && !bar.is_finished() {
                    bar.finish();
                    if bar.is_hidden() && !self.quiet {
                        let replica = bars.plan.replicas.get(update.pipeline as usize);
                        let stage = replica.and_then(|r| r.stages.get(update.stage));
                        let place = stage.map_or(String::new(), |s| format!(" on {}/{}", s.worker, s.device));
                        let loaded = bytes(update.bytes_total);
                        report::tell(&format!("stage {}{place} loaded {loaded}", update.stage));
                    }
                }
            }
        }
    }

    /// Clears the bars once the server is up.
    pub fn finish(&self) {
        if let Some(bars) = self.bars.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A terminal that cannot be cleared is no reason to stop.
            let _ = bars.group.clear();
        }
    }
}

impl Bars {
    fn new(plan: Arc<Plan>) -> Self {
        let group = MultiProgress::new();
        let style = ProgressStyle::with_template(
            "{prefix:>8} {bar:32} {bytes:>11} / {total_bytes:11} {bytes_per_sec}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let stages = plan.replicas.iter().flat_map(|r| 0..r.stages.len()).map(|index| {
            let bar = if report::draws() { ProgressBar::new(0) } else { ProgressBar::hidden() };
            let bar = if bar.is_hidden() { bar } else { group.add(bar) };
            bar.set_style(style.clone());
            bar.set_prefix(format!("stage {index}"));
            bar
        });
        Bars { stages: stages.collect(), group, plan: plan.clone() }
    }

    /// The bar of a stage; replicas follow each other.
    fn bar(&self, replica: u32, stage: usize) -> Option<&ProgressBar> {
        let before = self.plan.replicas.iter().take(replica as usize);
        self.stages.get(before.map(|r| r.stages.len()).sum::<usize>() + stage)
    }
}
