//! Weights of sentence-transformers' modules, which lie in directories of their own.

use super::{Checkpoint, SINGLE, WeightsError, is_plain};

const MODULES: &str = "modules.json";

/// What stands before the names of a module's tensors; `number` is its place in modules.json.
pub(crate) fn module_prefix(number: usize) -> String {
    format!("modules.{number}.")
}

impl Checkpoint {
    /// The directories of the modules that modules.json lists, in order; of a module without one, an empty name. Whether
    /// the list is as it should be, is for who reads what modules do.
    pub(super) fn module_directories(&self) -> Result<Vec<String>, WeightsError> {
        let Some(modules) = self.json(MODULES)? else { return Ok(Vec::new()) };
        let path = |module: &serde_json::Value| {
            let path = module.get("path").and_then(|path| path.as_str());
            path.filter(|path| is_plain(path)).unwrap_or_default().to_owned()
        };
        Ok(modules.as_array().map_or_else(Vec::new, |modules| modules.iter().map(path).collect()))
    }

    /// Adds the tensors of every module that has some of its own.
    pub(super) fn add_modules(&mut self) -> Result<(), WeightsError> {
        for (number, directory) in self.module_directories()?.into_iter().enumerate() {
            let name = format!("{directory}/{SINGLE}");
            let file = if directory.is_empty() { None } else { self.dir.file(&name)? };
            if let Some(file) = file {
                self.add_shard(&name, file, &module_prefix(number))?;
            }
        }
        Ok(())
    }
}
