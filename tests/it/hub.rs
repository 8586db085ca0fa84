//! A hub of models on the loopback, and where its large files lie: what `strata pull` asks of them, and what they do wrong.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

/// The commit of its only model, `some/one`.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request that it has heard.
#[derive(Debug, Clone)]
pub struct Heard {
    /// Of where large files lie, and not of the hub.
    pub elsewhere: bool,
    pub path: String,
    /// With a token.
    pub authorized: bool,
    /// From which byte on.
    pub from: usize,
    /// Bytes of the file that were sent.
    pub sent: usize,
}

/// What it has, and does.
#[derive(Default)]
pub struct Content {
    /// What it sends, by name.
    pub files: BTreeMap<String, Vec<u8>>,
    /// What it lists.
    pub siblings: Vec<Value>,
    /// A status, and the code in the header, for every request.
    pub refusal: Option<(u16, &'static str)>,
    /// Files whose next answer ends after so many bytes: by a closed connection, or, if true, by silence.
    pub cut: BTreeMap<String, (usize, bool)>,
}

/// The hub.
pub struct Hub {
    pub address: String,
    pub content: Arc<Mutex<Content>>,
    heard: Arc<Mutex<Vec<Heard>>>,
}

impl Content {
    /// Adds a file, and lists it as the hub does.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>) {
        let hex =
            |hash: ring::digest::Digest| hash.as_ref().iter().map(|b| format!("{b:02x}")).collect::<String>();
        let git = hex(digest(
            &SHA1_FOR_LEGACY_USE_ONLY,
            &[format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat(),
        ));
        let mut sibling = json!({"rfilename": name, "size": bytes.len(), "blobId": git});
        if is_large(name) {
            sibling["lfs"] =
                json!({"sha256": hex(digest(&SHA256, &bytes)), "size": bytes.len(), "pointerSize": 134});
        }
        self.siblings.push(sibling);
        self.files.insert(name.to_owned(), bytes);
    }

    /// Adds all files of a directory.
    pub fn add_all(&mut self, directory: &Path) {
        let mut folders = vec![directory.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => folders.push(entry.path()),
                    false => {
                        let name = entry.path().strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
                        self.add(&name, fs::read(entry.path()).unwrap());
                    }
                }
            }
        }
    }
}

impl Hub {
    /// Starts one, which lives as long as the process.
    pub fn start(content: Content) -> Hub {
        let content = Arc::new(Mutex::new(content));
        let heard = Arc::<Mutex<Vec<Heard>>>::default();
        let listeners = [false, true].map(|elsewhere| (elsewhere, TcpListener::bind("127.0.0.1:0").unwrap()));
        let [hub, large] = [0, 1].map(|i: usize| format!("http://{}", listeners[i].1.local_addr().unwrap()));
        for (elsewhere, listener) in listeners {
            let (content, heard, large) = (content.clone(), heard.clone(), large.clone());
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (content, heard, large) = (content.clone(), heard.clone(), large.clone());
                    thread::spawn(move || {
                        // Who asks may be killed.
                        let _ = answer(stream, elsewhere, &content, &heard, &large);
                    });
                }
            });
        }
        Hub { address: hub, content, heard }
    }

    /// What it has heard since it was asked last.
    pub fn heard(&self) -> Vec<Heard> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }
}

fn is_large(name: &str) -> bool {
    [".safetensors", ".bin", ".onnx", ".gguf"].iter().any(|end| name.ends_with(end))
}

/// What the hub says of a file in the head of an answer: the commit, and the hash by which caches know it.
fn facts(sibling: &Value) -> String {
    let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
    match sibling["lfs"]["sha256"].as_str() {
        Some(hash) => {
            format!("{commit}X-Linked-ETag: \"{hash}\"\r\nX-Linked-Size: {}\r\n", sibling["size"])
        }
        None => format!("{commit}ETag: \"{}\"\r\n", sibling["blobId"].as_str().unwrap_or_default()),
    }
}

/// A file in a listing of folders.
fn entry(sibling: &Value) -> Value {
    let mut entry = json!({
        "type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"],
    });
    if let Some(lfs) = sibling["lfs"].as_object() {
        entry["lfs"] = json!({"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]});
    }
    entry
}

/// Answers the one request of a connection.
fn answer(
    mut stream: TcpStream,
    elsewhere: bool,
    content: &Mutex<Content>,
    heard: &Mutex<Vec<Heard>>,
    large: &str,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        head.push(line.trim().to_owned());
    }
    let asks_for_head = head.first().is_some_and(|line| line.starts_with("HEAD "));
    let path = head.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
    let header = |name: &str| {
        let mut lines = head.iter().filter_map(|line| line.split_once(": "));
        lines.find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
    };
    let from =
        header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from = from.unwrap_or(0);
    let mut request =
        Heard { elsewhere, path: path.clone(), authorized: header("authorization").is_some(), from, sent: 0 };
    let reply = |stream: &mut TcpStream, status: &str, more: &str, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{more}\r\n",
            body.len()
        )?;
        if asks_for_head { Ok(()) } else { stream.write_all(body) }
    };
    let (refusal, file, cut, facts) = {
        let mut content = content.lock().unwrap();
        let name = path.strip_prefix(&format!("/some/one/resolve/{COMMIT}/")).or(path.strip_prefix("/lfs/"));
        let cut = name.filter(|_| elsewhere).and_then(|name| content.cut.remove(name));
        let listed = name.and_then(|name| content.siblings.iter().find(|s| s["rfilename"] == name));
        (
            content.refusal,
            name.and_then(|name| Some((name.to_owned(), content.files.get(name)?.clone()))),
            cut,
            listed.map(facts).unwrap_or_default(),
        )
    };
    if let Some((status, code)) = refusal {
        heard.lock().unwrap().push(request);
        return reply(&mut stream, &format!("{status} No"), &format!("X-Error-Code: {code}\r\n"), b"no");
    }
    match file {
        Some((name, _)) if is_large(&name) && !elsewhere => {
            heard.lock().unwrap().push(request);
            reply(&mut stream, "302 Found", &format!("{facts}Location: {large}/lfs/{name}\r\n"), b"")
        }
        Some((_, bytes)) => {
            let end = cut.map_or(bytes.len(), |(end, _)| end);
            request.sent = end - from;
            heard.lock().unwrap().push(request);
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let (last, all) = (bytes.len() - 1, bytes.len());
            let range = format!("Content-Range: bytes {from}-{last}/{all}\r\n");
            let more = format!("{facts}{}", if from > 0 { range.as_str() } else { "" });
            write!(
                stream,
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{more}\r\n",
                all - from
            )?;
            if asks_for_head {
                return Ok(());
            }
            stream.write_all(&bytes[from..end])?;
            if cut.is_some_and(|(_, silent)| silent) {
                // Until whoever asked is gone.
                let _ = reader.read(&mut [0]);
            }
            Ok(())
        }
        None if path.starts_with("/api/models/some/one/revision/") => {
            heard.lock().unwrap().push(request);
            let siblings = content.lock().unwrap().siblings.clone();
            let body = json!({"id": "some/one", "sha": COMMIT, "siblings": siblings}).to_string();
            reply(&mut stream, "200 OK", "Content-Type: application/json\r\n", body.as_bytes())
        }
        // As the hub's own client asks, and `strata pull` does not.
        None if path.starts_with(&format!("/api/models/some/one/tree/{COMMIT}?")) => {
            let siblings = content.lock().unwrap().siblings.clone();
            let tree: Vec<Value> = siblings.iter().map(entry).collect();
            let body = json!(tree).to_string();
            reply(&mut stream, "200 OK", "Content-Type: application/json\r\n", body.as_bytes())
        }
        None => reply(&mut stream, "404 Not Found", "X-Error-Code: RepoNotFound\r\n", b"no"),
    }
}
