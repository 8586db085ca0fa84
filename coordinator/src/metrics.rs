//! Labels and bounds that metrics share. What is measured is beside what measures it, in files called `series.rs`.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{exemplar::HistogramWithExemplars, family::MetricConstructor, histogram::Histogram},
};

/// The labels of all that vLLM has: which of its engines, of which there is one, and by which name the model is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfModel {
    pub engine: &'static str,
    pub model_name: String,
}

impl OfModel {
    /// Of a model that is asked for by this name.
    pub fn new(name: &str) -> Self {
        OfModel { engine: "0", model_name: name.to_owned() }
    }
}

/// Makes histograms of these bounds, ascending.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds(pub &'static [f64]);

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

impl<S> MetricConstructor<HistogramWithExemplars<S>> for Bounds {
    fn new_metric(&self) -> HistogramWithExemplars<S> {
        HistogramWithExemplars::new(self.0.iter().copied())
    }
}
