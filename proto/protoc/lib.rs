//! What generates code of `.proto` files: protox reads them, so that no `protoc` is needed, prost-build makes messages of
//! them, and tonic-build makes clients and servers.
//!
//! It has the name of the crate that usually does so, and takes its place in the build script of etcd-client, which would
//! run `protoc`: it has what that script calls, and one that calls more does not compile. Only one crate of that name can be
//! in a build, so our own script calls this one, too.

use std::{io, path::Path};

use proc_macro2::TokenStream;
use prost_build::{Config, ServiceGenerator};
use prost_types::FileDescriptorSet;
use tonic_build::CodeGenBuilder;

/// Code for clients and servers, which connect by tonic's transport.
pub fn configure() -> Builder {
    Builder { messages: Config::new(), services: Services { server: true, transport: true } }
}

/// What code is generated.
#[derive(Debug)]
pub struct Builder {
    messages: Config,
    services: Services,
}

impl Builder {
    /// Whether there is code for servers.
    #[must_use]
    pub fn build_server(mut self, enable: bool) -> Self {
        self.services.server = enable;
        self
    }

    /// Whether clients can connect by themselves: they have a function `connect` then.
    #[must_use]
    pub fn build_transport(mut self, enable: bool) -> Self {
        self.services.transport = enable;
        self
    }

    /// Fields below this path of the protocol's names are `Bytes`, which share what was received.
    #[must_use]
    pub fn bytes(mut self, path: &str) -> Self {
        self.messages.bytes([path]);
        self
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
        self.compile_fds(files)
    }

    /// Compiles what was read already, into `OUT_DIR`.
    ///
    /// # Errors
    /// If the code cannot be written.
    pub fn compile_fds(mut self, files: FileDescriptorSet) -> io::Result<()> {
        self.messages.service_generator(Box::new(self.services));
        self.messages.compile_fds(files)
    }
}

#[derive(Debug)]
struct Services {
    server: bool,
    transport: bool,
}

impl ServiceGenerator for Services {
    fn generate(&mut self, service: prost_build::Service, code: &mut String) {
        let service = Service::from(service);
        let mut generator = CodeGenBuilder::new();
        generator.emit_package(true).build_transport(self.transport);
        let mut tokens = generator.generate_client(&service, "super");
        if self.server {
            tokens.extend(generator.generate_server(&service, "super"));
        }
        match syn::parse2(tokens) {
            Ok(file) => code.push_str(&prettyplease::unparse(&file)),
            // The compiler says so where the code is included.
            Err(error) => code.push_str(&error.to_compile_error().to_string()),
        }
    }
}

/// A service as tonic-build takes it: its code is in a module beside the messages.
struct Service {
    of: prost_build::Service,
    methods: Vec<Method>,
}

impl From<prost_build::Service> for Service {
    fn from(of: prost_build::Service) -> Self {
        let methods = of.methods.iter().cloned().map(Method).collect();
        Service { of, methods }
    }
}

impl tonic_build::Service for Service {
    type Comment = String;
    type Method = Method;

    fn name(&self) -> &str {
        &self.of.name
    }

    fn package(&self) -> &str {
        &self.of.package
    }

    fn identifier(&self) -> &str {
        &self.of.proto_name
    }

    fn methods(&self) -> &[Method] {
        &self.methods
    }

    fn comment(&self) -> &[String] {
        &self.of.comments.leading
    }
}

struct Method(prost_build::Method);

impl tonic_build::Method for Method {
    type Comment = String;

    fn name(&self) -> &str {
        &self.0.name
    }

    fn identifier(&self) -> &str {
        &self.0.proto_name
    }

    fn codec_path(&self) -> &'static str {
        "tonic_prost::ProstCodec"
    }

    fn client_streaming(&self) -> bool {
        self.0.client_streaming
    }

    fn server_streaming(&self) -> bool {
        self.0.server_streaming
    }

    fn comment(&self) -> &[String] {
        &self.0.comments.leading
    }

    fn request_response_name(&self, messages: &str, _: bool) -> (TokenStream, TokenStream) {
        (beside(messages, &self.0.input_type), beside(messages, &self.0.output_type))
    }
}

/// A type as it is named in a module that finds `messages` there.
fn beside(messages: &str, name: &str) -> TokenStream {
    let path = match name.starts_with("::") || name.starts_with('(') {
        true => name.to_owned(),
        false => format!("{messages}::{name}"),
    };
    // What is no type is an error where the code is included.
    path.parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makes_clients_and_servers() {
        let out = tempfile::tempdir().unwrap();
        let proto = "syntax = \"proto3\"; package a.b;
            message M { bytes data = 1; }
            // Says it.
            service KV { rpc One(M) returns (stream M); rpc Two(stream M) returns (M); }";
        std::fs::write(out.path().join("s.proto"), proto).unwrap();
        let compile = |configure: fn(Builder) -> Builder| {
            let mut builder = configure(super::configure());
            builder.messages.out_dir(out.path());
            builder.compile_protos(&[out.path().join("s.proto")], &[out.path()]).unwrap();
            std::fs::read_to_string(out.path().join("a.b.rs")).unwrap()
        };
        let code = compile(|builder| builder.bytes("."));
        for part in [
            "pub data: ::prost::bytes::Bytes",
            "pub mod kv_client",
            "pub async fn connect",
            "pub mod kv_server",
            "/a.b.KV/One",
            "/// Says it.",
            "tonic::Streaming<super::M>",
        ] {
            assert!(code.contains(part), "{part} is missing in {code}");
        }
        let less = compile(|builder| builder.build_server(false).build_transport(false));
        assert!(
            !less.contains("kv_server")
                && !less.contains("pub async fn connect")
                && less.contains("kv_client")
        );
        let missing = configure().compile_protos(&["missing.proto"], &["."]).unwrap_err();
        assert!(missing.to_string().contains("missing.proto"), "{missing}");
    }
}
