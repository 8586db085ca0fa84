//! `tonic-prost-build` for build scripts of dependencies that would run `protoc`: compiles by protox, which needs no program.
//!
//! etcd-client's is the only one. It has what that calls, and a script that calls more does not compile.

use std::{io, path::Path};

/// Settings of the generated code, with the defaults of the crate whose place this takes.
pub fn configure() -> Builder {
    Builder(generator::configure())
}

/// What code is generated.
#[derive(Debug)]
pub struct Builder(generator::Builder);

impl Builder {
    /// Whether there is code for servers.
    #[must_use]
    pub fn build_server(self, enable: bool) -> Self {
        Builder(self.0.build_server(enable))
    }

    /// Compiles files that lie below one of `includes`, into `OUT_DIR`.
    ///
    /// # Errors
    /// If a file or what it imports is missing or wrong, or the code cannot be written.
    pub fn compile_protos(
        self,
        protos: &[impl AsRef<Path>],
        includes: &[impl AsRef<Path>],
    ) -> io::Result<()> {
        let files = protox::compile(protos, includes).map_err(io::Error::other)?;
        self.0.compile_fds(files)
    }
}
