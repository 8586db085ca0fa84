//! Binds the tensors of a checkpoint to the slots of a model; none may be missing, misshapen or left over.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    ModelError,
    architecture::{
        Attention, Ffn, Head, Names, Norm, Position, Refinement, Shape, Site, Slot, Source, Tower,
    },
};
use crate::weights::{Checkpoint, TensorDType, module_prefix};

/// Where the weights of one expert's slot come from: one tensor, or one per part; none for a norm whose factors are all 1.
pub(super) type Bindings = BTreeMap<(Site, Slot, usize), Vec<Bound>>;

/// A tensor, where in its slot it belongs, and how it lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bound {
    /// The weight.
    pub weight: String,
    /// The bias, if the file has one.
    pub bias: Option<String>,
    /// Row of the slot where it begins.
    pub first_row: usize,
    /// How it lies in the file.
    pub layout: Layout,
    /// Which of the experts that the weight holds, one after the other, if it holds several.
    pub expert: Option<usize>,
    /// The only rows of the file's tensor that count, in the slot's order, if not all do.
    pub chosen: Option<Vec<usize>>,
}

/// How the elements of a tensor lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// As in the slot.
    Rows,
    /// Transposed.
    Columns,
    /// For each head of keys: the rows of its heads of queries, its own, and those of its values.
    Heads {
        /// Heads of queries.
        heads: usize,
        /// Heads of keys.
        kv_heads: usize,
        /// Rows of each.
        head_dim: usize,
    },
    /// In each head, rows that turn with each other lie side by side, in the slot half of what turns apart.
    EvenOdd {
        /// Rows of each head.
        head_dim: usize,
        /// Pairs of them that turn.
        pairs: usize,
    },
    /// Less by one than in the slot.
    PlusOne,
    /// The second half of the rows, of which there are so many, then the first.
    Swapped {
        /// Rows of both.
        rows: usize,
    },
}

impl Layout {
    /// Row and column in the slot of element `i` of a file's tensor that has `n` rows and `k` columns in the slot.
    pub fn place(self, i: usize, n: usize, k: usize) -> (usize, usize) {
        match self {
            Layout::Rows | Layout::PlusOne => (i / k, i % k),
            Layout::Columns => (i % n, i / n),
            Layout::Heads { .. } | Layout::EvenOdd { .. } | Layout::Swapped { .. } => {
                (self.row(i / k), i % k)
            }
        }
    }

    /// Row in the slot of the file's row (or element of a bias) `row`.
    pub fn row(self, row: usize) -> usize {
        match self {
            Layout::Heads { heads, kv_heads, head_dim } => {
                let queries = heads / kv_heads;
                let (head, within) = (row / head_dim / (queries + 2), row / head_dim % (queries + 2));
                let to = match within.checked_sub(queries) {
                    None => head * queries + within,
                    Some(kind) => heads + kind * kv_heads + head,
                };
                to * head_dim + row % head_dim
            }
            Layout::EvenOdd { head_dim, pairs } => {
                let (head, i) = (row / head_dim, row % head_dim);
                head * head_dim + if i < 2 * pairs { i % 2 * pairs + i / 2 } else { i }
            }
            Layout::Swapped { rows } => (row + rows / 2) % rows,
            _ => row,
        }
    }
}

/// Endings of what older files of all families hold, and transformers ignores: what can be computed anew.
const BUFFERS: [&str; 2] = ["rotary_emb.inv_freq", "position_ids"];

pub(super) fn bind(checkpoint: &Checkpoint, tower: &Tower, names: &Names) -> Result<Bindings, ModelError> {
    let mut binder =
        Binder { checkpoint, tower, names, base: base(checkpoint, names), claimed: BTreeSet::new() };
    let mut bound = BTreeMap::new();
    for site in tower.sites() {
        for (slot, shape) in tower.slots(site) {
            for expert in 0..tower.copies(site, slot) {
                let tensors = match binder.fill(site, slot, shape, expert) {
                    Err(ModelError::MissingTensor(name)) if slot == Slot::Head && names.tied => {
                        binder.tie(&bound, &name)?
                    }
                    tensors => tensors?,
                };
                bound.insert((site, slot, expert), tensors);
            }
        }
    }
    let unclaimed = |name: &&String| !binder.claimed.contains(*name) && !binder.is_ignored(name);
    let unclaimed: Vec<String> = checkpoint.tensors().keys().filter(unclaimed).cloned().collect();
    if unclaimed.is_empty() { Ok(bound) } else { Err(ModelError::UnclaimedTensors(unclaimed)) }
}

/// The prefix of this file's names.
fn base(checkpoint: &Checkpoint, names: &Names) -> &'static str {
    let embedding = names.slots.iter().find(|(slot, _)| *slot == Slot::Embedding);
    let fits = |base: &&&str| {
        embedding.is_some_and(|(_, source)| {
            checkpoint.tensor(&format!("{base}{}.weight", source.name())).is_some()
        })
    };
    names.bases.iter().find(fits).or(names.bases.first()).copied().unwrap_or_default()
}

struct Binder<'a> {
    checkpoint: &'a Checkpoint,
    tower: &'a Tower,
    names: &'a Names,
    base: &'static str,
    claimed: BTreeSet<String>,
}

impl Binder<'_> {
    /// The tensors of a slot: its own, or those of its parts.
    fn fill(
        &mut self,
        site: Site,
        slot: Slot,
        shape: Shape,
        expert: usize,
    ) -> Result<Vec<Bound>, ModelError> {
        let whole = self.module(site, slot, expert);
        if let Some((_, Source::Ones)) = whole {
            return Ok(Vec::new());
        }
        let apart = slot.parts().iter().all(|part| self.module(site, *part, expert).is_some());
        let has = |(module, source): &(String, Source)| self.has(module, *source);
        if let Some((module, source)) = whole.filter(|whole| has(whole) || slot.parts().is_empty() || !apart)
        {
            return self.whole(site, slot, (&module, source), (shape, expert));
        }
        let (Shape::Product(_, k), [_, ..]) = (shape, slot.parts()) else {
            return Err(ModelError::MissingTensor(format!("{slot:?} of {site:?}")));
        };
        let mut first_row = 0;
        let has_rows = |part: &&Slot| self.tower.part_rows(site, **part) > 0;
        let parts: Vec<_> = slot.parts().iter().filter(has_rows).collect();
        parts
            .into_iter()
            .map(|part| {
                let missing = || ModelError::MissingTensor(format!("{part:?} of {site:?}"));
                let (module, source) = self.module(site, *part, expert).ok_or_else(missing)?;
                let rows = self.tower.part_rows(site, *part);
                let bound =
                    self.find((site, *part), (&module, source), Shape::Product(rows, k), (first_row, expert));
                first_row += rows;
                bound
            })
            .collect()
    }

    /// The tensor of a slot, or those of its heads.
    fn whole(
        &mut self,
        site: Site,
        slot: Slot,
        (module, source): (&str, Source),
        (shape, expert): (Shape, usize),
    ) -> Result<Vec<Bound>, ModelError> {
        let (Site::Layer(layer), true) = (site, module.contains("{h}")) else {
            return Ok(vec![self.find((site, slot), (module, source), shape, (0, expert))?]);
        };
        let attention = &self.tower.layers[layer].attention;
        let heads = if slot == Slot::QueryNorm { attention.heads } else { attention.kv_heads };
        let head_dim = attention.head_dim;
        let one = |head: usize| {
            let module = module.replace("{h}", &head.to_string());
            self.find((site, slot), (&module, source), Shape::Norm(head_dim), (head * head_dim, 0))
        };
        (0..heads).map(one).collect()
    }

    /// The head as the embedding; its bias is its own.
    fn tie(&mut self, bound: &Bindings, head: &str) -> Result<Vec<Bound>, ModelError> {
        let missing = || ModelError::MissingTensor(head.to_owned());
        let embedding = bound.get(&(Site::Input, Slot::Embedding, 0)).ok_or_else(missing)?;
        let mut tied = embedding.clone();
        let bias = head.strip_suffix(".weight").map(|module| format!("{module}.bias"));
        for tensor in &mut tied {
            tensor.bias = bias.as_ref().and_then(|name| self.claim(name));
            if let Some(bias) = &tensor.bias {
                self.check(bias, &[self.tower.vocab])?;
            }
        }
        Ok(tied)
    }

    /// The name of a slot's module in this file, without its ending, and how its tensor lies.
    fn module(&self, site: Site, slot: Slot, expert: usize) -> Option<(String, Source)> {
        if let (Slot::Refinement(number), Head::Embed(embedding)) = (slot, &self.tower.head) {
            let name = match embedding.refinements.get(usize::from(number))? {
                Refinement::Dense { module, .. } => format!("{}linear", module_prefix(*module)),
                Refinement::Norm { module, .. } => format!("{}norm", module_prefix(*module)),
                Refinement::Normalize => return None,
            };
            return Some((name, Source::Rows("")));
        }
        let experts = match site {
            Site::Layer(layer) => matches!(self.tower.layers[layer].ffn, Ffn::Moe(_)),
            _ => false,
        };
        let ffn = [Slot::GateUp, Slot::Gate, Slot::Up, Slot::Down].contains(&slot);
        let fits = |(s, source): &&(Slot, Source)| *s == slot && (!ffn || source.is_of_experts() == experts);
        let layer = if let Site::Layer(layer) = site { layer } else { 0 };
        let name = |base: &str, source: Source| {
            let name = source.name().replace("{}", &layer.to_string()).replace("{e}", &expert.to_string());
            (format!("{base}{name}"), source)
        };
        let under = self.names.slots.iter().filter(fits).map(|(_, source)| name(self.base, *source));
        let root = self.names.root.iter().filter(fits).map(|(_, source)| name("", *source));
        let mut named: Vec<_> = under.chain(root).collect();
        let there = named.iter().position(|(module, source)| self.has(module, *source));
        (!named.is_empty()).then(|| named.swap_remove(there.unwrap_or(0)))
    }

    fn has(&self, module: &str, source: Source) -> bool {
        let name = format!("{module}{}", source.ending()).replace("{h}", "0");
        self.names_of(&name).any(|name| self.checkpoint.tensor(&name).is_some())
    }

    fn find(
        &mut self,
        (site, slot): (Site, Slot),
        (module, source): (&str, Source),
        shape: Shape,
        (first_row, expert): (usize, usize),
    ) -> Result<Bound, ModelError> {
        let mut dimensions = shape.dimensions();
        let layout = match (source, site) {
            (Source::Columns(_), _) => {
                dimensions.reverse();
                Layout::Columns
            }
            (Source::Heads(_), Site::Layer(layer)) => {
                let attention = &self.tower.layers[layer].attention;
                let Attention { heads, kv_heads, head_dim, .. } = *attention;
                Layout::Heads { heads, kv_heads, head_dim }
            }
            (Source::EvenOdd(_), Site::Layer(layer)) => {
                let Attention { head_dim, position, .. } = self.tower.layers[layer].attention;
                if let Shape::Norm(len) = shape {
                    dimensions = vec![len / head_dim, head_dim];
                }
                let pairs = match position {
                    Position::Rope(set) => self.tower.ropes[set].pairs(),
                    _ => 0,
                };
                Layout::EvenOdd { head_dim, pairs }
            }
            (Source::PlusOne(_), _) => Layout::PlusOne,
            (Source::Swapped(_), _) => Layout::Swapped { rows: dimensions[0] },
            _ => Layout::Rows,
        };
        let experts = match (source, site) {
            (Source::Experts(_), Site::Layer(layer)) => Some(self.tower.layers[layer].ffn.experts()),
            _ => None,
        };
        dimensions.splice(..0, experts);
        let name = format!("{module}{}", source.ending());
        let weight = self.claim(&name).ok_or(ModelError::MissingTensor(name))?;
        self.check(&weight, &dimensions)?;
        // A norm by the root mean square moves nothing, and neither does a table.
        let may_have_bias = match shape {
            Shape::Norm(_) => !matches!(self.norm(site, slot), Some(Norm::Rms(_))),
            Shape::Table(..) => false,
            Shape::Product(..) => true,
        };
        let bias = if may_have_bias { self.claim(&format!("{module}.bias")) } else { None };
        if let Some(bias) = &bias {
            self.check(bias, &shape.dimensions()[..1])?;
        }
        Ok(Bound { weight, bias, first_row, layout, expert: experts.map(|_| expert), chosen: None })
    }

    /// The kind of the norm in `slot`.
    fn norm(&self, site: Site, slot: Slot) -> Option<Norm> {
        match (site, &self.tower.head) {
            (Site::Input, _) => self.tower.input.norm,
            (Site::Layer(layer), _) => Some(self.tower.layers[layer].flow.norm()),
            (Site::Output, head) if slot == Slot::HeadNorm => head.before().1,
            (Site::Output, Head::Embed(embedding)) => match slot {
                Slot::Refinement(number) => match embedding.refinements.get(usize::from(number)) {
                    Some(Refinement::Norm { norm, .. }) => Some(*norm),
                    _ => None,
                },
                _ => self.tower.norm,
            },
            (Site::Output, _) => self.tower.norm,
        }
    }

    /// The tensor called `name`, or by an alias of it, taken. A file that has both means the same by them.
    fn claim(&mut self, name: &str) -> Option<String> {
        let names = self.names_of(name);
        let found: Vec<String> = names.filter(|name| self.checkpoint.tensor(name).is_some()).collect();
        self.claimed.extend(found.iter().cloned());
        found.into_iter().next()
    }

    /// `name`, and its aliases.
    fn names_of(&self, name: &str) -> impl Iterator<Item = String> {
        let aliases = self.names.aliases.iter();
        let aliases =
            aliases.filter_map(move |(alias, of)| Some(format!("{}{alias}", name.strip_suffix(of)?)));
        [name.to_owned()].into_iter().chain(aliases)
    }

    fn is_ignored(&self, name: &str) -> bool {
        // A model that embeds has no use for another head.
        let other_head = |(slot, source): &(Slot, Source)| {
            *slot == Slot::Head && name.strip_suffix(".weight") == Some(source.name())
        };
        let embeds = matches!(self.tower.head, Head::Embed(_));
        let ignored = |pattern: &&str| match (pattern.split_once("{}"), pattern.strip_suffix('*')) {
            (Some((before, after)), _) => self.is_of_a_later_layer(name, before, after),
            (None, Some(beginning)) => name.starts_with(beginning),
            (None, None) => name.ends_with(*pattern),
        };
        self.names.ignore.iter().chain(&BUFFERS).any(ignored)
            || (embeds && self.names.root.iter().any(other_head))
            || self.checkpoint.is_ignored(name)
    }

    /// Whether a name has the number of a layer that the model does not have between two texts.
    fn is_of_a_later_layer(&self, name: &str, before: &str, after: &str) -> bool {
        let rest = name.strip_prefix(self.base).and_then(|name| name.strip_prefix(before));
        let number = rest.and_then(|rest| rest.split_once(after)?.0.parse::<usize>().ok());
        number.is_some_and(|number| number >= self.tower.layers.len())
    }

    fn check(&self, name: &str, expected: &[usize]) -> Result<(), ModelError> {
        let tensor =
            self.checkpoint.tensor(name).ok_or_else(|| ModelError::MissingTensor(name.to_owned()))?;
        if tensor.shape != expected {
            return Err(ModelError::Shape {
                tensor: name.to_owned(),
                found: tensor.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        match tensor.dtype {
            TensorDType::Float(_) => Ok(()),
            TensorDType::Other { .. } => Err(ModelError::Format(name.to_owned())),
        }
    }
}
