//! `strata verify`: what a model's weights are, module by module, and whether two copies are the same.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{Read, Write},
    path::Path,
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use strata_proto::root;
use strata_worker::model::{self, ModuleDigest};

use crate::{args::VerifyArgs, model_dir};

/// Largest report that is read: a model of 100 000 tensors fits.
const MAX_REPORT: u64 = 64 << 20;

/// What the weights of a model are.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Report {
    /// Digest of the whole, in hexadecimal as all of them.
    digest: String,
    /// In order: embedding, layers, head.
    modules: Vec<Module>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Module {
    /// As `layer 0`.
    module: String,
    digest: String,
    tensors: Vec<Tensor>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    digest: String,
}

impl From<ModuleDigest> for Module {
    fn from(ModuleDigest { id, digest, tensors }: ModuleDigest) -> Self {
        let tensors = tensors.into_iter().map(|tensor| Tensor {
            name: tensor.name,
            dtype: tensor.dtype.name().to_owned(),
            shape: tensor.shape,
            digest: format!("{:032x}", tensor.digest),
        });
        Module { module: id.to_string(), digest: digest.to_string(), tensors: tensors.collect() }
    }
}

/// Something that two models have not in common.
#[derive(Debug, PartialEq, Serialize)]
struct Difference {
    module: String,
    /// Absent if only one of them has the module.
    tensor: Option<String>,
    /// What the first has, if it has it.
    here: Option<String>,
    /// What the second has, if it has it.
    there: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { module, tensor, here, there } = self;
        let what = tensor.as_ref().map_or(module.clone(), |tensor| format!("{module}: {tensor}"));
        match (here, there) {
            (Some(here), Some(there)) => write!(f, "{what} differs: {here}, there {there}"),
            (Some(_), None) => write!(f, "{what} is only here"),
            _ => write!(f, "{what} is only there"),
        }
    }
}

/// `strata verify`
pub fn verify(args: &VerifyArgs) -> anyhow::Result<()> {
    let report = read(&args.model, &args.ignore_tensors)?;
    let against = args.against.as_deref().map(|other| match other.is_file() {
        true => read_report(other),
        false => read(other, &args.ignore_tensors),
    });
    let differences = against.transpose()?.map(|other| differences(&report, &other));
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut value = serde_json::to_value(&report)?;
        if let Some(differences) = &differences {
            value["differences"] = serde_json::to_value(differences)?;
        }
        writeln!(out, "{value}")?;
    } else {
        let rows = report.modules.iter().map(|module| (&module.module, &module.digest));
        for (name, digest) in [(&"model".to_owned(), &report.digest)].into_iter().chain(rows) {
            writeln!(out, "{name:<10} {digest}")?;
        }
        for difference in differences.iter().flatten() {
            writeln!(out, "{difference}")?;
        }
    }
    match (differences.map_or(0, |found| found.len()), &args.against) {
        (1.., Some(other)) => bail!("the weights are not those of {}", other.display()),
        _ => Ok(()),
    }
}

/// Reads the model in a directory.
fn read(directory: &Path, ignored: &[String]) -> anyhow::Result<Report> {
    let (_, directory) = model_dir::open(directory)?;
    let modules =
        model::digests(&directory, ignored).with_context(|| format!("model {}", directory.display()))?;
    let digest = root(modules.iter().map(|module| (module.id, module.digest))).to_string();
    Ok(Report { digest, modules: modules.into_iter().map(Module::from).collect() })
}

/// Reads what `--json` printed earlier.
fn read_report(path: &Path) -> anyhow::Result<Report> {
    let shown = path.display();
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("{shown}"))?;
    file.take(MAX_REPORT).read_to_string(&mut text).with_context(|| format!("{shown}"))?;
    serde_json::from_str(&text).with_context(|| {
        format!("{shown}: expected a model directory, or what `strata verify --json` printed")
    })
}

/// What two models have not in common: of modules that differ, each tensor that does.
fn differences(here: &Report, there: &Report) -> Vec<Difference> {
    let theirs: BTreeMap<_, _> = there.modules.iter().map(|module| (&module.module, module)).collect();
    let ours: BTreeMap<_, _> = here.modules.iter().map(|module| (&module.module, module)).collect();
    let mut found = Vec::new();
    for module in &here.modules {
        match theirs.get(&module.module) {
            Some(other) if other.digest == module.digest => {}
            other => in_module(Some(module), other.copied(), &mut found),
        }
    }
    let missing = there.modules.iter().filter(|module| !ours.contains_key(&module.module));
    missing.for_each(|module| in_module(None, Some(module), &mut found));
    found
}

/// The tensors that differ between two modules of one name; the module itself if one has no such module, or no tensor differs
/// although the digest does, as in a report that was changed.
fn in_module(here: Option<&Module>, there: Option<&Module>, found: &mut Vec<Difference>) {
    let Some(module) = here.or(there).map(|module| module.module.clone()) else { return };
    let before = found.len();
    if let (Some(here), Some(there)) = (here, there) {
        let of = |module: &Module| -> BTreeMap<String, Tensor> {
            module.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.clone())).collect()
        };
        let (ours, theirs) = (of(here), of(there));
        let mut names: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
        names.sort();
        names.dedup();
        for name in names {
            let (here, there) = (ours.get(name), theirs.get(name));
            if here != there {
                let shown = |tensor: &Tensor| {
                    format!(
                        "{} {:?} {}",
                        tensor.dtype,
                        tensor.shape,
                        tensor.digest.get(..16).unwrap_or_default()
                    )
                };
                let (here, there) = (here.map(shown), there.map(shown));
                found.push(Difference { module: module.clone(), tensor: Some(name.clone()), here, there });
            }
        }
    }
    if found.len() == before {
        let digest = |module: Option<&Module>| module.map(|module| module.digest.clone());
        found.push(Difference { here: digest(here), there: digest(there), module, tensor: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(modules: &[(&str, &[(&str, &str)])]) -> Report {
        let tensor = |(name, digest): &(&str, &str)| Tensor {
            name: (*name).to_owned(),
            dtype: "bf16".to_owned(),
            shape: vec![2, 3],
            digest: digest.repeat(32),
        };
        let module = |(name, tensors): &(&str, &[(&str, &str)])| Module {
            module: (*name).to_owned(),
            digest: tensors.iter().map(|(_, digest)| *digest).collect(),
            tensors: tensors.iter().map(tensor).collect(),
        };
        Report { digest: String::new(), modules: modules.iter().map(module).collect() }
    }

    #[test]
    fn names_what_differs() {
        let here =
            report(&[("embedding", &[("e", "aa")]), ("layer 0", &[("q", "bb"), ("k", "cc")]), ("head", &[])]);
        assert_eq!(differences(&here, &here), []);
        let there = report(&[
            ("embedding", &[("e", "aa")]),
            ("layer 0", &[("q", "dd"), ("v", "cc")]),
            ("layer 1", &[]),
        ]);
        let found: Vec<_> = differences(&here, &there).iter().map(Difference::to_string).collect();
        assert_eq!(
            found,
            [
                "layer 0: k is only here",
                "layer 0: q differs: bf16 [2, 3] bbbbbbbbbbbbbbbb, there bf16 [2, 3] dddddddddddddddd",
                "layer 0: v is only there",
                "head is only here",
                "layer 1 is only there",
            ]
        );
        // A report whose digest was changed by hand.
        let mut changed = here.clone();
        changed.modules[0].digest = "ff".into();
        assert_eq!(differences(&here, &changed)[0].to_string(), "embedding differs: aa, there ff");
    }
}
