//! `strata pull`: a model of the Hugging Face hub, downloaded into the hub's cache.

mod cache;
mod hub;
mod listing;

use std::{
    collections::{BTreeMap, BTreeSet},
    env::var_os,
    io::Write,
};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use strata_worker::{HubId, LISTS, hub_cache, wanted, wanted_gguf};

use self::{cache::ModelCache, hub::Hub, listing::RemoteFile};
use crate::{
    args::PullArgs,
    report::{self, misused},
    show::bytes,
};

/// Largest file that says which others are wanted.
const MAX_LIST: u64 = 64 << 20;

/// `strata pull`
pub fn pull(args: &PullArgs) -> anyhow::Result<()> {
    let Some(id) = HubId::parse(&args.model) else {
        return Err(misused(format!("{}: expected OWNER/NAME or OWNER/NAME@REVISION", args.model)));
    };
    if let Some(file) = args.file.as_ref().filter(|file| !file.to_lowercase().ends_with(".gguf")) {
        return Err(misused(format!("--file {file}: expected the name of a GGUF file of {}", id.name)));
    }
    let cache = hub_cache(|name| var_os(name)).context("HOME is not set: there is no cache of the hub")?;
    let hub = Hub::new(|name| var_os(name))?;
    let revision = id.revision.as_deref().unwrap_or("main");
    let listing = hub.list(&id.name, revision)?;
    let files: BTreeMap<&str, &RemoteFile> =
        listing.files.iter().map(|file| (file.name.as_str(), file)).collect();
    let names: BTreeSet<String> = files.keys().map(|name| (*name).to_owned()).collect();
    let download = Download {
        hub: &hub,
        id: &id.name,
        commit: &listing.commit,
        cache: ModelCache::new(&cache, &id.name)?,
    };

    let chosen = match &args.file {
        Some(file) => wanted_gguf(&names, file),
        None => {
            let mut lists = BTreeMap::new();
            for file in LISTS.iter().filter_map(|name| files.get(name)) {
                if file.bytes > MAX_LIST {
                    bail!(
                        "{}: {} has {}; expected {} at most",
                        id.name,
                        file.name,
                        bytes(file.bytes),
                        bytes(MAX_LIST)
                    );
                }
                download.fetch(file)?;
                lists.insert(file.name.clone(), download.cache.read(file)?);
            }
            wanted(&names, &lists)
        }
    };
    let chosen = chosen.map_err(|what| anyhow::anyhow!("{} at {revision}: {what}", id.name))?;
    let chosen: Vec<_> = chosen.iter().filter_map(|name| files.get(name.as_str()).copied()).collect();
    let missing: Vec<_> = chosen.iter().copied().filter(|file| !download.cache.has(file)).collect();
    report::tell(&format!(
        "{} at {revision} is commit {}: {} files, {}; {} to download",
        id.name,
        listing.commit,
        chosen.len(),
        bytes(chosen.iter().map(|file| file.bytes).sum()),
        bytes(missing.iter().map(|file| file.bytes).sum())
    ));
    if args.file.is_none() && !names.contains("tokenizer.json") {
        report::warn(&format!("{} has no tokenizer.json: put one beside its files to serve it", id.name));
    }
    download.cache.check_space(&missing)?;
    missing.iter().try_for_each(|file| download.fetch(file))?;
    chosen.iter().try_for_each(|file| download.cache.link(&listing.commit, file))?;
    download.cache.name_revision(revision, &listing.commit)?;
    let mut path = download.cache.snapshot(&listing.commit);
    if args.file.is_some() {
        path.extend(chosen.first().map(|file| &file.name));
    }
    Ok(writeln!(std::io::stdout(), "{}", path.display())?)
}

/// A commit of a model on the hub, on its way into the cache.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a str,
    commit: &'a str,
    cache: ModelCache,
}

impl Download<'_> {
    /// Downloads a file, or the rest of it, unless the cache has it.
    fn fetch(&self, file: &RemoteFile) -> anyhow::Result<()> {
        let bar = if report::draws() { ProgressBar::new(file.bytes) } else { ProgressBar::hidden() };
        let style = "{wide_msg} {bar:32} {bytes:>11} / {total_bytes:11} {bytes_per_sec}";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(file.name.clone());
        let open = |from| self.hub.open(self.id, self.commit, file, from);
        let came = self.cache.fetch(file, open, |position| bar.set_position(position))?;
        bar.finish();
        if bar.is_hidden() && came > 0 {
            let rest = if came < file.bytes {
                format!(", of which {} came now", bytes(came))
            } else {
                String::new()
            };
            report::tell(&format!("{} {}{rest}", file.name, bytes(file.bytes)));
        }
        Ok(())
    }
}
