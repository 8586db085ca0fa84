//! What people see: plans as tables, bytes with units.

use std::collections::BTreeSet;

use comfy_table::{CellAlignment, Table, presets};
use strata_proto::{Forecast, FormatBytes, Offload, Plan, Replica, StagePlan, StateBytes};

use crate::terminal::{clipped, wrapped};

const BAR_WIDTH: u64 = 16;
/// Characters that are left of every name.
const LEAST_NAME: usize = 8;

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

/// How much a table says of a stage, where not all of it fits the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Detail {
    /// The device by so many characters, and nothing that the other columns say, too.
    Least(usize),
    /// No bar.
    Figures,
    /// A link by its kind; why it was chosen stands below.
    Kinds,
    All,
}

/// A plan for people: one row and one bar per stage, in lines of at most `width` characters.
pub fn plan_table(plan: &Plan, width: Option<usize>) -> String {
    let weights = plan.quantization.map_or(String::new(), |q| format!(", weights in {q}"));
    let mut out = format!("{} in {}{weights}", plan.model, plan.dtype);
    for (index, replica) in plan.replicas.iter().enumerate() {
        let (detail, table) = stages(&replica.stages, width);
        let count = match replica.stages.len() {
            1 => "1 stage".to_owned(),
            count => format!("{count} stages"),
        };
        let sentence = format!("replica {index}: {count}, {}", outlook(replica));
        out += &format!("\n{}\n{table}", wrapped(&sentence, width));
        if detail < Detail::All {
            let links = replica.stages.iter().filter_map(|stage| stage.link.as_ref());
            let reasons: BTreeSet<_> = links.map(|link| format!("{}: {}", link.kind, link.why)).collect();
            reasons.iter().for_each(|reason| out += &format!("\n{}", wrapped(reason, width)));
        }
    }
    remarks(plan).for_each(|remark| out += &format!("\n{}", wrapped(&remark, width)));
    out
}

/// A replica's stages, in as much detail as the width allows.
fn stages(stages: &[StagePlan], width: Option<usize>) -> (Detail, String) {
    let least = Detail::Least(usize::MAX);
    for detail in [Detail::All, Detail::Kinds, Detail::Figures, least] {
        let table = stage_table(stages, detail);
        let excess = width.map_or(0, |width| length(&table).saturating_sub(width));
        if excess == 0 {
            return (detail, table);
        }
        if detail == least {
            let longest = stages.iter().map(|s| device(s).chars().count()).max().unwrap_or_default();
            let detail = Detail::Least(longest.saturating_sub(excess).max(LEAST_NAME));
            return (detail, stage_table(stages, detail));
        }
    }
    (least, stage_table(stages, least))
}

fn length(table: &str) -> usize {
    table.lines().map(|line| line.chars().count()).max().unwrap_or_default()
}

fn device(stage: &StagePlan) -> String {
    format!("{}/{}", stage.worker, stage.device)
}

fn stage_table(stages: &[StagePlan], detail: Detail) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let headings =
        ["stage", "device", "layers", "weights", "cache", "workspace", "of budget", "", "ms/token", "link"];
    // Columns that are left out, and the headings of those that are shorter.
    let (left_out, shorter): (&[usize], &[(usize, &str)]) = match detail {
        Detail::All | Detail::Kinds => (&[], &[]),
        Detail::Figures => (&[7], &[]),
        Detail::Least(_) => (&[5, 7], &[(0, "#"), (6, "used")]),
    };
    let shown = |column: &usize| !left_out.contains(column);
    table.set_header((0..headings.len()).filter(shown).map(|column| {
        shorter.iter().find(|(at, _)| *at == column).map_or(headings[column], |(_, heading)| *heading)
    }));
    for (number, stage) in stages.iter().enumerate() {
        let used = stage.total_bytes();
        let budget = stage.budget_bytes.max(1);
        // At least one cell, so that a stage on a large device can be seen at all.
        let filled = (used * BAR_WIDTH).div_ceil(budget).min(BAR_WIDTH) as usize;
        let mut cells = [
            number.to_string(),
            device(stage),
            format!("{} ({})", stage.layers, stage.layers.len()),
            bytes(stage.weight_bytes) + if stage.mapped { " mapped" } else { "" },
            states(&stage.states),
            bytes(stage.workspace_bytes),
            format!("{} / {}", bytes(used), bytes(stage.budget_bytes)),
            format!("{}{}", "█".repeat(filled), "░".repeat(BAR_WIDTH as usize - filled)),
            format!("{:.3}", stage.predicted_ms),
            stage.link.as_ref().map_or(String::new(), |l| format!("{} ({})", l.kind, l.why)),
        ];
        if detail < Detail::All {
            cells[9] = stage.link.as_ref().map_or(String::new(), |l| l.kind.to_string());
        }
        if let Detail::Least(width) = detail {
            cells[1] = clipped(&cells[1], width);
            cells[2] = stage.layers.to_string();
            cells[4] = bytes(stage.states.total());
            cells[6] = format!("{} %", (used * 100).div_ceil(budget));
        }
        table
            .add_row(cells.into_iter().enumerate().filter(|(column, _)| shown(column)).map(|(_, cell)| cell));
    }
    let right = (0..headings.len()).filter(shown).map(|column| [3, 4, 5, 6, 8].contains(&column));
    for (column, _) in table.column_iter_mut().zip(right).filter(|(_, right)| *right) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    without_trailing_blanks(&table)
}

/// What one plan gains over another.
pub fn gain(now: &Plan, then: &Plan) -> String {
    let ([single, full], [single_then, full_then]) = (now.speed(), then.speed());
    let percent = |now: f64, then: f64| (then / now.max(f64::MIN_POSITIVE) - 1.0) * 100.0;
    format!(
        "predicted tokens/s: of one stream {single:.1} -> {single_then:.1} ({:+.0} %), of all {full:.1} -> {full_then:.1} ({:+.0} \
         %)",
        percent(single, single_then),
        percent(full, full_then)
    )
}

fn without_trailing_blanks(table: &Table) -> String {
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
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
    if recurrent == 0 && cross_kv == 0 {
        return bytes(paged_kv);
    }
    let kinds = [(paged_kv, "paged"), (recurrent, "recurrent"), (cross_kv, "cross")];
    let kinds = kinds.into_iter().filter(|(n, _)| *n > 0).map(|(n, kind)| format!("{} {kind}", bytes(n)));
    kinds.collect::<Vec<_>>().join(" + ")
}

/// What is slower than it might be, in sentences.
pub fn remarks(plan: &Plan) -> impl Iterator<Item = String> {
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
    without_trailing_blanks(&table)
}

#[cfg(test)]
mod tests {
    use strata_proto::{Quantization, v1};

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

    /// Three stages, whose devices have long names.
    fn plan() -> Plan {
        let stage = |first: u32, link: &str| v1::PlannedStage {
            worker: "inference-worker-7.example.org:7801".into(),
            device: "cuda:0".into(),
            layers: Some(v1::LayerRange { first, end: first + 40 }),
            weight_bytes: 600 << 30,
            workspace_bytes: 1023 << 20,
            budget_bytes: 1023 << 30,
            predicted_ms: 12.345,
            link: link.into(),
            link_reason: "their workers are in different processes".into(),
            ..v1::PlannedStage::default()
        };
        let replica = v1::Replica {
            stages: vec![stage(0, "tcp"), stage(40, "tcp"), stage(80, "")],
            state_slots: 0,
            kv_capacity_tokens: 131_072,
            forecast: Some(v1::Forecast { single: 123.4, batch: 16, full: 1234.5 }),
        };
        let long =
            "a sentence of which nobody would say that it is a short one, as it has so many words in it";
        let plan = v1::Plan {
            model: "model".into(),
            dtype: "bf16".into(),
            replicas: vec![replica],
            warnings: vec![long.into()],
            ..v1::Plan::default()
        };
        plan.try_into().unwrap()
    }

    #[test]
    fn a_plan_fits_the_terminal() {
        let plan = plan();
        let whole = plan_table(&plan, None);
        assert!(
            whole.contains("inference-worker-7.example.org:7801/cuda:0") && whole.contains("█"),
            "{whole}"
        );
        assert!(whole.contains("tcp (their workers are in different processes)"), "{whole}");
        for columns in [80, 100, 120, 160] {
            let table = plan_table(&plan, Some(columns));
            assert!(length(&table) <= columns, "{columns}:\n{table}");
            assert!(table.contains("tcp: their workers are in different processes"), "{table}");
            assert!(
                table.contains("0..40") && table.contains("40..80") && table.contains("600.0 GiB"),
                "{table}"
            );
        }
        let narrow = plan_table(&plan, Some(80));
        assert!(narrow.contains("infer") && narrow.contains("…") && narrow.contains("cuda:0"), "{narrow}");
        assert_eq!(plan_table(&plan, Some(1000)), whole);
    }

    #[test]
    fn stages_are_counted() {
        let mut plan = plan();
        assert!(plan_table(&plan, None).contains("replica 0: 3 stages, cache"));
        plan.replicas[0].stages.truncate(1);
        assert!(plan_table(&plan, None).contains("replica 0: 1 stage, cache"));
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
