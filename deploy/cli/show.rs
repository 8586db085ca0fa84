//! What people see: plans as tables, loading as bars, bytes with units.

use std::{
    io::IsTerminal,
    sync::{Arc, Mutex, PoisonError},
};

use comfy_table::{CellAlignment, Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use strata_coordinator::engine::Notice;
use strata_proto::{Forecast, FormatBytes, Offload, Plan, Replica, StateBytes};

const BAR_WIDTH: u64 = 16;

/// `1536` as `1.5 KiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// A plan for people: one row and one bar per stage.
pub fn plan_table(plan: &Plan) -> String {
    let weights = plan.quantization.map_or(String::new(), |q| format!(", weights in {q}"));
    let mut out = format!("{} in {}{weights}", plan.model, plan.dtype);
    for (index, replica) in plan.replicas.iter().enumerate() {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header([
            "stage",
            "device",
            "layers",
            "weights",
            "cache",
            "workspace",
            "of budget",
            "",
            "ms/token",
            "link",
        ]);
        for column in [3, 4, 5, 6, 8] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for (number, stage) in replica.stages.iter().enumerate() {
            let used = stage.total_bytes();
            let budget = stage.budget_bytes.max(1);
            // At least one cell, so that a stage on a large device can be seen at all.
            let filled = (used * BAR_WIDTH).div_ceil(budget).min(BAR_WIDTH) as usize;
            table.add_row([
                number.to_string(),
                format!("{}/{}", stage.worker, stage.device),
                format!("{} ({})", stage.layers, stage.layers.len()),
                bytes(stage.weight_bytes) + if stage.mapped { " mapped" } else { "" },
                states(&stage.states),
                bytes(stage.workspace_bytes),
                format!("{} / {}", bytes(used), bytes(stage.budget_bytes)),
                format!("{}{}", "█".repeat(filled), "░".repeat(BAR_WIDTH as usize - filled)),
                format!("{:.3}", stage.predicted_ms),
                stage.link.as_ref().map_or(String::new(), |l| format!("{} ({})", l.kind, l.why)),
            ]);
        }
        out += &format!("\nreplica {index}: {} stages, {}\n{table}", replica.stages.len(), outlook(replica));
    }
    remarks(plan).for_each(|remark| out += &format!("\n{remark}"));
    out
}

/// For how much there is room in a replica, and how fast it is going to be.
fn outlook(replica: &Replica) -> String {
    let Forecast { single, batch, full } = replica.forecast;
    let room = match (replica.kv_capacity_tokens, replica.state_slots) {
        (0, 0) => {
            return format!(
                "predicted {single:.1} tokens/s for one input, {full:.1} in full steps of {batch}"
            );
        }
        (tokens, 0) => format!("cache for {tokens} tokens"),
        (0, slots) => format!("states of {slots} sequences"),
        (tokens, slots) => format!("cache for {tokens} tokens and states of {slots} sequences"),
    };
    format!("{room}, predicted {single:.1} tokens/s for one stream, {full:.1} for {batch} at once")
}

/// Bytes that a stage keeps of sequences, by kind where there is more than pages of keys and values.
fn states(of: &StateBytes) -> String {
    let StateBytes { paged_kv, recurrent, cross_kv } = *of;
    let kinds = [(paged_kv, "paged"), (recurrent, "recurrent"), (cross_kv, "cross")];
    if recurrent == 0 && cross_kv == 0 {
        return bytes(paged_kv);
    }
    let kinds = kinds.into_iter().filter(|(n, _)| *n > 0).map(|(n, kind)| format!("{} {kind}", bytes(n)));
    kinds.collect::<Vec<_>>().join(" + ")
}

/// What is slower than it might be, in sentences.
fn remarks(plan: &Plan) -> impl Iterator<Item = String> {
    let offloaded = plan.offload.as_ref().map(offloaded);
    offloaded.into_iter().chain(plan.warnings.iter().map(|warning| format!("warning: {warning}")))
}

/// What it costs that layers are on a CPU, in a sentence or two.
fn offloaded(offload: &Offload) -> String {
    let Offload { layers, of, bytes: weights, tokens_per_second, without, quantize } = offload;
    let weights = bytes(*weights);
    let remedy = match quantize {
        Some(quantization) => format!("--quantize {quantization} would keep all of them on the GPUs."),
        None => "No quantization would keep all of them on the GPUs.".to_owned(),
    };
    format!(
        "{layers} of {of} layers ({weights}) are on the CPU: about {tokens_per_second:.1} tokens/s instead of \
         {without:.1}. {remedy}"
    )
}

/// What the weights of each stage would take in each format.
pub fn footprint_table(plan: &Plan) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["weights of", "f32", "bf16 or f16", "int8", "int4"]);
    let mut total = FormatBytes::default();
    let row =
        |name: String, b: &FormatBytes| [name, bytes(b.f32), bytes(b.bf16), bytes(b.int8), bytes(b.int4)];
    for (number, stage) in plan.replicas.iter().take(1).flat_map(|r| &r.stages).enumerate() {
        let b = &stage.footprint;
        table.add_row(row(format!("stage {number}"), b));
        total = FormatBytes::of(|format| total.at(format) + b.at(format));
    }
    table.add_row(row("all".into(), &total));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

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
            Notice::Waiting(..) if self.quiet => {}
            Notice::Waiting(joined, expected) => eprintln!("{joined} of {expected} workers are there"),
            Notice::Planned(plan) => {
                match self.quiet {
                    true => remarks(&plan).for_each(|remark| eprintln!("{remark}")),
                    false => eprintln!("{}", plan_table(&plan)),
                }
                *bars = Some(Bars::new(plan));
            }
            Notice::Checked(findings) => {
                findings.iter().filter(|f| !f.passed).for_each(|finding| eprintln!("{finding}"));
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
                        eprintln!("stage {}{place} loaded {}", update.stage, bytes(update.bytes_total));
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
            let bar =
                if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
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

#[cfg(test)]
mod tests {
    use strata_proto::Quantization;

    use super::*;

    #[test]
    fn says_what_the_cpu_costs() {
        let offload = Offload {
            layers: 6,
            of: 32,
            bytes: 2_254_857_830,
            tokens_per_second: 9.42,
            without: 41.0,
            quantize: Some(Quantization::Int8),
        };
        assert_eq!(
            offloaded(&offload),
            "6 of 32 layers (2.1 GiB) are on the CPU: about 9.4 tokens/s instead of 41.0. --quantize int8 would keep \
             all of them on the GPUs."
        );
        assert!(
            offloaded(&Offload { quantize: None, ..offload })
                .ends_with("No quantization would keep all of them on the GPUs.")
        );
    }

    #[test]
    fn states_are_told_apart_where_there_are_several_kinds() {
        let paged = StateBytes { paged_kv: 4096, ..StateBytes::default() };
        assert_eq!(states(&paged), "4.0 KiB");
        assert_eq!(states(&StateBytes { recurrent: 512, ..paged }), "4.0 KiB paged + 512 B recurrent");
        assert_eq!(states(&StateBytes { cross_kv: 512, ..StateBytes::default() }), "512 B cross");
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(24 << 30), "24.0 GiB");
        assert_eq!(bytes(5 << 40), "5.0 TiB");
    }
}
