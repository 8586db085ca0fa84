//! `strata kernels`: what each kernel of a device reaches.

use std::{fs, io::Write, path::Path, time::Duration};

use anyhow::Context;
use clap::ValueEnum;
use strata_proto::{DeviceKind, Format, Quantization};
use strata_worker::{
    WorkerError,
    device::{self, DeviceSpec},
    measure::{self, Line, Report, Request},
    model::Model,
};

use crate::{
    args::{KernelsArgs, Shape},
    random_model, report,
};

/// `strata kernels`
pub fn kernels(args: &KernelsArgs) -> anyhow::Result<()> {
    let model = model(&args.model)?;
    let dtype = args.dtype.0.unwrap_or(model.dtype);
    let device = args.device.clone().or_else(|| device::all().into_iter().next());
    let quantized = if args.quantize.is_empty() { Quantization::ALL.to_vec() } else { args.quantize.clone() };
    let formats = [Format::Float(dtype)].into_iter().chain(quantized.into_iter().map(Format::Quantized));
    let device = device.unwrap_or(DeviceSpec::cpu(None));
    let request = Request {
        compute: args.compute.resolve(usize::from(device.kind == DeviceKind::Cpu)),
        kernels: args.kernel_cache.resolve([&device]),
        device,
        model,
        dtype,
        formats: formats.collect(),
        rows: if args.rows.is_empty() { measure::ROWS.to_vec() } else { args.rows.clone() },
        budget: Duration::from_secs(args.seconds),
    };
    let mut out = std::io::stdout();
    let mut say = |report: &Report| {
        if args.json {
            return writeln!(out, "{}", serde_json::to_string(report)?);
        }
        match report {
            Report::Limits(limits) => writeln!(
                out,
                "{}: {:.1} GB/s of memory{}\n\n{}",
                request.device,
                limits.bytes_per_second / 1e9,
                limits.flops_per_second.iter().map(in_format).collect::<String>(),
                heading()
            ),
            Report::Line(line) => writeln!(out, "{}", row(line)),
            Report::Left { not_measured, never_measured } => {
                let never = never_measured.iter().map(|what| format!("\nNot measured: {what}"));
                let more =
                    format!("\n{not_measured} more were not measured: no time (--seconds) or no memory");
                let more = (*not_measured > 0).then_some(more);
                never.chain(more).try_for_each(|line| writeln!(out, "{line}"))
            }
        }
    };
    let io = |source| WorkerError::Io { path: "standard output".into(), source };
    measure::measure(&request, &mut |report| say(&report).map_err(io))?;
    Ok(())
}

/// The model of a directory's configuration, or of a name.
fn model(name: &str) -> anyhow::Result<Model> {
    let path = Path::new(name).join("config.json");
    let config = match Shape::from_str(name, false) {
        Ok(shape) => random_model::config(shape),
        Err(_) if path.is_file() => {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?
        }
        Err(_) => {
            let shapes = Shape::value_variants().iter().filter_map(ValueEnum::to_possible_value);
            let shapes: Vec<_> = shapes.map(|value| value.get_name().to_owned()).collect();
            return Err(report::misused(format!(
                "model {name}: expected a directory with a config.json, or one of {}",
                shapes.join(", ")
            )));
        }
    };
    Model::without_checkpoint(config).with_context(|| format!("model {name}"))
}

fn in_format((format, flops_per_second): (&String, &f64)) -> String {
    format!(", {:.2} TFLOP/s in {format}", flops_per_second / 1e12)
}

fn heading() -> String {
    format!(
        "{:22} {:6} {:>14} {:>5} {:>7} {:>11} {:>9} {:>9}  bound",
        "kernel", "format", "shape", "rows", "context", "us", "GB/s", "TFLOP/s"
    )
}

fn row(line: &Line) -> String {
    let context = line.context.map_or(String::new(), |context| context.to_string());
    let share = line
        .share
        .zip(line.bound)
        .map_or("-".to_owned(), |(share, bound)| format!("{:5.1} % of {bound}", 100.0 * share));
    format!(
        "{:22} {:6} {:>14} {:>5} {context:>7} {:>11.1} {:>9.1} {:>9.2}  {share}",
        line.kernel,
        line.format,
        line.shape,
        line.rows,
        line.microseconds,
        line.gigabytes_per_second,
        line.teraflops_per_second
    )
}
