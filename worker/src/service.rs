//! A worker: its devices' stage threads behind the calls of `strata_proto::Worker`.

use std::{
    io::{ErrorKind, Read},
    net::SocketAddr,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use strata_proto::{
    BLOCK_TOKENS, DeviceKind, Files, Lead, MAX_MODEL_FILES, PROTOCOL, Progress, StageChannel, Worker,
    v1::{self, Fence},
};
use tokio::sync::watch;
use tonic::{Status, async_trait};
use uuid::Uuid;

use crate::{
    device::{self, Compute, DeviceSpec, Directories, Held},
    error::WorkerError,
    incarnation::StepHook,
    meter::Seen,
    model::{self, ModelError},
    stage::{Connect, Load, Prepare, Resident, StageThread},
    transport::{Link, link_token, loopback::Hub, nccl, tcp::Listener},
    weights::{HubId, ModelDir, NAMED_TEMPLATES, TOKENIZER_FILES, describe_file, is_gguf},
};

/// Most chat templates that have names.
const MAX_NAMED_TEMPLATES: usize = 64;

/// Shortest silence after which somebody may count as lost.
const MIN_HEARTBEAT_MS: u32 = 100;

/// Where a worker finds models.
#[derive(Debug, Clone)]
pub enum Models {
    /// A model's name is a directory under this one.
    Under(PathBuf),
    /// One model, by this name.
    One {
        /// Its name on the wire.
        name: String,
        /// Its directory.
        directory: PathBuf,
    },
}

impl Models {
    /// The directory of `name`.
    fn resolve(&self, name: &str) -> Result<PathBuf, WorkerError> {
        let no = |why: &str| WorkerError::NoModel { name: name.to_owned(), why: why.to_owned() };
        match self {
            Models::One { name: only, directory } if only == name => Ok(directory.clone()),
            Models::One { name: only, .. } => Err(no(&format!("it serves {only:?} only"))),
            Models::Under(root) => {
                let directory = match HubId::parse(name) {
                    // In the hub's cache, models have names of two parts.
                    Some(id) => id.snapshot(root).map_err(|why| no(&why.to_string()))?,
                    // A name from the wire must not walk out of the model directory.
                    None => {
                        match (Path::new(name).components().next(), Path::new(name).components().nth(1)) {
                            (Some(Component::Normal(_)), None) if !name.contains(['/', '\\']) => {
                                root.join(name)
                            }
                            _ => {
                                return Err(no(
                                    "expected the name of a directory, or OWNER/NAME[@REVISION] in the hub's cache",
                                ));
                            }
                        }
                    }
                };
                let real = directory.canonicalize().and_then(|real| Ok((real, root.canonicalize()?)));
                let Ok((real, root)) = real else {
                    return Err(no(&format!("there is no directory {}", directory.display())));
                };
                if !real.starts_with(&root) {
                    return Err(no(&format!(
                        "{} is a symbolic link to {}, outside --models: give --models the directory that holds the model",
                        directory.display(),
                        real.display()
                    )));
                }
                match real.is_dir() || is_gguf(&directory) {
                    true => Ok(directory),
                    false => Err(no(&format!("{} is {}", directory.display(), describe_file(&directory)))),
                }
            }
        }
    }
}

/// How to set a worker up.
#[derive(Clone)]
pub struct WorkerConfig {
    /// Where models are.
    pub models: Models,
    /// Its devices.
    pub devices: Vec<DeviceSpec>,
    /// How they compute.
    pub compute: Compute,
    /// Where to accept activations over TCP.
    pub link_address: SocketAddr,
    /// Where others reach that, `HOST:PORT`, if it is somewhere else for them.
    pub link_advertise: Option<String>,
    /// Shared by workers of one process.
    pub hub: Arc<Hub>,
    /// Fault injection for tests.
    pub step_hook: Option<StepHook>,
    /// Where it may write.
    pub directories: Directories,
    /// How often the weights of running stages are compared with what was loaded; never, if nothing is said.
    pub verify_every: Option<Duration>,
}

impl WorkerConfig {
    /// A worker by itself in its process, with all devices of this machine, which writes nothing to its disk.
    pub fn new(models: Models) -> Self {
        let devices = device::all();
        let processors = devices.iter().filter(|d| d.kind == DeviceKind::Cpu).count();
        WorkerConfig {
            models,
            devices,
            compute: Compute::shared_by(processors),
            link_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            link_advertise: None,
            hub: Arc::default(),
            step_hook: None,
            directories: Directories::default(),
            verify_every: None,
        }
    }
}

/// A worker.
pub struct LocalWorker {
    config: WorkerConfig,
    boot_id: String,
    stages: Vec<(String, StageThread)>,
    listener: Listener,
    lead: Mutex<Lead>,
    /// Whether it is about to end.
    draining: watch::Sender<bool>,
    resident: Resident,
}

impl LocalWorker {
    /// Starts the threads of a worker.
    ///
    /// # Errors
    /// If there is no device, two have one id, or the activation port cannot be bound.
    pub fn start(config: WorkerConfig) -> Result<Self, WorkerError> {
        let mut ids: Vec<_> = config.devices.iter().map(|d| &d.id).collect();
        ids.sort();
        ids.dedup();
        if ids.is_empty() || ids.len() != config.devices.len() {
            return Err(WorkerError::BadMessage("a worker needs devices, each named once".into()));
        }
        let io = |path: &str| {
            let path = path.to_owned();
            move |source| WorkerError::Io { path, source }
        };
        let listener = Listener::bind(config.link_address)
            .map_err(io(&format!("listening on {}", config.link_address)))?;
        let resident = Resident::default();
        let stages = config
            .devices
            .iter()
            .map(|d| {
                let (hook, directories) = (config.step_hook.clone(), config.directories.clone());
                let (compute, resident) = (config.compute, resident.clone());
                let stage = StageThread::spawn(d, compute, hook, directories, resident, config.verify_every)?;
                Ok((d.id.clone(), stage))
            })
            .collect::<Result<_, WorkerError>>()?;
        let worker = LocalWorker {
            boot_id: Uuid::new_v4().to_string(),
            stages,
            listener,
            lead: Mutex::default(),
            draining: watch::Sender::default(),
            resident,
            config,
        };
        // Speeds are measured once, which takes seconds on a GPU: before anybody waits for them.
        worker.offers()?;
        Ok(worker)
    }

    /// The weights that its devices hold, now and whenever that changes.
    pub fn resident(&self) -> watch::Receiver<Vec<v1::StageSpec>> {
        self.resident.subscribe()
    }

    /// Takes no new incarnation from now on, and says so to the coordinators of those that run; returns when none is
    /// left.
    pub async fn drain(&self) {
        self.draining.send_replace(true);
        for (_, stage) in &self.stages {
            stage.vacant().await;
        }
    }

    /// Devices on which an incarnation runs.
    pub fn occupied(&self) -> Vec<&str> {
        let occupied = self.stages.iter().filter(|(_, stage)| stage.is_occupied());
        occupied.map(|(id, _)| id.as_str()).collect()
    }

    /// Whether it takes no new incarnation any more.
    pub(crate) fn is_draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// Its devices, as operators see them.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Seen<'_>> {
        self.stages.iter().map(|(id, stage)| stage.seen(id))
    }

    /// Refuses what would begin an incarnation, once it is draining.
    fn check_not_draining(&self) -> Result<(), WorkerError> {
        if *self.draining.borrow() { Err(WorkerError::Draining) } else { Ok(()) }
    }

    fn stage(&self, device: &str) -> Result<&StageThread, WorkerError> {
        let found = self.stages.iter().find(|(id, _)| id == device);
        found.map(|(_, stage)| stage).ok_or_else(|| WorkerError::NoDevice {
            asked: device.to_owned(),
            have: self.stages.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>().join(", "),
        })
    }

    /// Refuses a stale fence, remembers a new one, and ends what it supersedes on `device`.
    fn admit(&self, fence: Option<Fence>, device: &str) -> Result<(Fence, &StageThread), WorkerError> {
        let fence = fence.ok_or_else(|| WorkerError::BadMessage("the call carries no fence".into()))?;
        let stage = self.stage(device)?;
        let stale = |newest| WorkerError::Stale { got: fence, newest };
        self.lead().admit(fence, Instant::now()).map_err(stale)?;
        stage.supersede(&fence);
        Ok((fence, stage))
    }

    fn lead(&self) -> MutexGuard<'_, Lead> {
        self.lead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn offers(&self) -> Result<Vec<strata_proto::Device>, WorkerError> {
        device::offers(&self.config.devices, self.config.compute, &self.config.directories, |id| {
            self.stage(id).map_or(Held::default(), StageThread::held)
        })
    }
}

fn spec_of(spec: Option<v1::StageSpec>) -> Result<v1::StageSpec, WorkerError> {
    spec.ok_or_else(|| WorkerError::BadMessage("the call names no stage".into()))
}

/// Silence after which somebody counts as lost, as a call says it.
fn heartbeat_timeout(ms: u32) -> Result<Duration, WorkerError> {
    match ms {
        MIN_HEARTBEAT_MS.. => Ok(Duration::from_millis(ms.into())),
        _ => Err(WorkerError::BadMessage(format!(
            "a heartbeat timeout of {ms} ms is too short: expected at least {MIN_HEARTBEAT_MS} ms"
        ))),
    }
}

/// Runs file work off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WorkerError> + Send + 'static,
) -> Result<T, WorkerError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(WorkerError::Internal(e.to_string())))
}

#[async_trait]
impl Worker for LocalWorker {
    async fn describe(&self, request: v1::DescribeRequest) -> Result<v1::Described, Status> {
        if let Some(claim) = request.claim {
            self.lead().claim(claim, Instant::now());
        }
        let profile = if request.model.is_empty() {
            None
        } else {
            let directory = self.config.models.resolve(&request.model)?;
            strata_proto::limits::check_ignored(&request.ignore_tensors).map_err(WorkerError::BadMessage)?;
            let v1::DescribeRequest { model, ignore_tensors, .. } = request;
            let describe = move || Ok(model::describe_ignoring(&directory, &model, &ignore_tensors)?);
            Some(blocking(describe).await?)
        };
        let offers = self.offers()?;
        Ok(v1::Described {
            protocol_min: PROTOCOL,
            protocol_max: PROTOCOL,
            boot_id: self.boot_id.clone(),
            hub_id: self.config.hub.id(),
            devices: offers.into_iter().map(Into::into).collect(),
            profile: profile.map(Into::into),
            draining: *self.draining.borrow(),
            lead: Some(self.lead().told(Instant::now())),
            resident: self.resident.borrow().clone(),
        })
    }

    async fn read_tokenizer(&self, request: v1::ReadTokenizerRequest) -> Result<Files, Status> {
        let directory = self.config.models.resolve(&request.model)?;
        Ok(blocking(move || read_files(&directory)).await?)
    }

    async fn load(&self, request: v1::LoadRequest) -> Result<Progress, Status> {
        self.check_not_draining()?;
        let spec = spec_of(request.spec)?;
        let (_, stage) = self.admit(request.fence, &spec.device)?;
        let directory = self.config.models.resolve(&spec.model)?;
        strata_proto::limits::check_ignored(&request.ignore_tensors).map_err(WorkerError::BadMessage)?;
        let v1::LoadRequest { ignore_tensors, reread, .. } = request;
        Ok(stage.load(Load { spec, directory, ignored: ignore_tensors, reread }))
    }

    async fn prepare(&self, request: v1::PrepareRequest) -> Result<v1::Prepared, Status> {
        self.check_not_draining()?;
        let spec = spec_of(request.spec)?;
        let (fence, stage) = self.admit(request.fence, &spec.device)?;
        if request.block_tokens != BLOCK_TOKENS {
            let text = format!("blocks hold {BLOCK_TOKENS} tokens here, not {}", request.block_tokens);
            return Err(WorkerError::BadMessage(text).into());
        }
        if request.state_slots > 0 {
            let text = "this worker knows no model with states of fixed size: upgrade it".to_owned();
            return Err(WorkerError::BadMessage(text).into());
        }
        let heartbeat_timeout = heartbeat_timeout(request.heartbeat_timeout_ms)?;
        let pending = match request.upstream_token.is_empty() {
            true => None,
            false => {
                Some(self.listener.expect(link_token(&request.upstream_token).map_err(WorkerError::from)?))
            }
        };
        let budget = self.offers()?.into_iter().find(|d| d.id == spec.device).map_or(0, |d| d.budget_bytes);
        let prepare = Prepare {
            fence,
            spec,
            kv_blocks: request.kv_blocks,
            max_step_tokens: request.max_step_tokens,
            max_step_rows: request.max_step_rows,
            budget,
            pending,
            heartbeat_timeout,
        };
        let prepared = stage.prepare(prepare).await?;
        let nccl_id = match request.mint_nccl_id {
            true => nccl::mint_id().map_err(WorkerError::from)?.to_vec(),
            false => Vec::new(),
        };
        let advertised = self.config.link_advertise.clone();
        let link_address = advertised.unwrap_or_else(|| self.listener.address().to_string());
        Ok(v1::Prepared { link_address, nccl_id: nccl_id.into(), ..prepared })
    }

    async fn connect(&self, request: v1::ConnectRequest) -> Result<(), Status> {
        let (fence, stage) = self.admit(request.fence, &request.device)?;
        let link = |link: Option<v1::Link>| link.map(Link::try_from).transpose();
        let upstream = link(request.upstream).map_err(WorkerError::from)?;
        let downstream = link(request.downstream).map_err(WorkerError::from)?;
        let hub = self.config.hub.clone();
        Ok(stage.connect(Connect { fence, upstream, downstream, hub }).await?)
    }

    async fn run(&self, open: v1::Open) -> Result<StageChannel, Status> {
        heartbeat_timeout(open.heartbeat_timeout_ms)?;
        let (fence, stage) = self.admit(open.fence, &open.device)?;
        Ok(stage.run(fence, self.draining.subscribe())?)
    }

    async fn abort(&self, request: v1::AbortRequest) -> Result<(), Status> {
        let fence =
            request.fence.ok_or_else(|| WorkerError::BadMessage("the call carries no fence".into()))?;
        self.stage(&request.device)?.abort(&fence).await;
        Ok(())
    }
}

fn read_files(directory: &Path) -> Result<Files, WorkerError> {
    let directory = ModelDir::open(directory).map_err(ModelError::from)?;
    if let Some(made) = directory.made() {
        return match made.values().map(|file| file.len() as u64).sum::<u64>() {
            0..=MAX_MODEL_FILES => Ok(made.clone()),
            size => {
                let path = directory.path().display();
                let why =
                    format!("the tokenizer in {path} has {size} bytes: expected at most {MAX_MODEL_FILES}");
                Err(WorkerError::WrongState(why))
            }
        };
    }
    let mut files = Files::new();
    let mut total = 0;
    let names = TOKENIZER_FILES.map(str::to_owned).into_iter().chain(named_templates(directory.path())?);
    for name in names {
        let path = directory.path().join(&name).display().to_string();
        let io = |source| WorkerError::Io { path: path.clone(), source };
        let Some(file) = directory.file(&name).map_err(ModelError::from)? else { continue };
        let size = file.metadata().map_err(io)?.len();
        total += size;
        if total > MAX_MODEL_FILES {
            let why = format!(
                "{path} has {size} bytes: the files of a tokenizer may have {MAX_MODEL_FILES} together"
            );
            return Err(WorkerError::WrongState(why));
        }
        let mut bytes = Vec::new();
        file.take(size).read_to_end(&mut bytes).map_err(io)?;
        files.insert(name, bytes);
    }
    Ok(files)
}

/// The chat templates that have names, as paths inside the model's directory, in order.
fn named_templates(directory: &Path) -> Result<Vec<String>, WorkerError> {
    let folder = directory.join(NAMED_TEMPLATES);
    let io = |source| WorkerError::Io { path: folder.display().to_string(), source };
    let entries = match std::fs::read_dir(&folder) {
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
            return Ok(Vec::new());
        }
        entries => entries.map_err(io)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(io)?.file_name();
        let Some(name) = name.to_str().filter(|name| name.ends_with(".jinja")) else { continue };
        if names.len() == MAX_NAMED_TEMPLATES {
            let why = format!("{} has more than {MAX_NAMED_TEMPLATES} chat templates", folder.display());
            return Err(WorkerError::WrongState(why));
        }
        names.push(format!("{NAMED_TEMPLATES}/{name}"));
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_chat_templates_travel_with_the_model() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str| std::fs::write(root.path().join(name), name).unwrap();
        std::fs::create_dir(root.path().join(NAMED_TEMPLATES)).unwrap();
        for name in
            ["config.json", "additional_chat_templates/rag.jinja", "additional_chat_templates/notes.txt"]
        {
            write(name);
        }
        let files = read_files(root.path()).unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["additional_chat_templates/rag.jinja", "config.json"]);
        for n in 0..MAX_NAMED_TEMPLATES {
            write(&format!("additional_chat_templates/{n}.jinja"));
        }
        assert!(read_files(root.path()).unwrap_err().to_string().contains("more than 64 chat templates"));
    }

    #[test]
    fn model_names_cannot_leave_the_directory() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("good")).unwrap();
        let models = Models::Under(root.path().to_owned());
        models.resolve("good").unwrap();
        for bad in ["", ".", "..", "../good", "good/", "good/../good", "/etc", "a\\b", "missing"] {
            assert!(models.resolve(bad).is_err(), "{bad:?} was resolved");
        }
        // As the hub's cache has them.
        std::fs::create_dir_all(root.path().join("models--a--b/snapshots/0123456789")).unwrap();
        assert!(models.resolve("a/b@0123456").unwrap().ends_with("models--a--b/snapshots/0123456789"));
        for bad in ["a/b", "a/c", "a/b@../../good", "a/b/c"] {
            assert!(models.resolve(bad).is_err(), "{bad:?} was resolved");
        }
        let elsewhere = tempfile::tempdir().unwrap();
        let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, root.path().join(name)).unwrap();
        link(Path::new("good"), "alias");
        link(elsewhere.path(), "away");
        models.resolve("alias").unwrap();
        let refused = models.resolve("away").unwrap_err().to_string();
        assert!(refused.contains("outside --models"), "{refused}");
    }

    #[test]
    fn files_of_a_tokenizer_come_from_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let model = root.path().join("model");
        std::fs::create_dir(&model).unwrap();
        std::fs::write(root.path().join("secret"), "secret").unwrap();
        std::fs::write(model.join("config.json"), "{}").unwrap();
        assert_eq!(read_files(&model).unwrap(), Files::from([("config.json".to_owned(), b"{}".to_vec())]));
        std::os::unix::fs::symlink("../secret", model.join("tokenizer.json")).unwrap();
        let refused = read_files(&model).unwrap_err().to_string();
        assert!(refused.contains("tokenizer.json: it is a symbolic link to"), "{refused}");
    }
}
