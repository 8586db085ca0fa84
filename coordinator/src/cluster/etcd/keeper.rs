//! Records in etcd. They change rarely, so each call has a connection of its own.

use etcd_client::GetOptions;
use tonic::async_trait;

use super::{
    config::Etcd,
    connection::{call, connect},
    error::EtcdError,
};
use crate::cluster::records::{Keeper, RecordError, Records};

/// Keeps records under the keys of a cluster.
#[derive(Debug, Clone)]
pub struct InEtcd(Etcd);

impl InEtcd {
    /// Records of this cluster.
    pub fn new(etcd: &Etcd) -> Self {
        InEtcd(etcd.clone())
    }

    async fn all(&self) -> Result<Records, EtcdError> {
        let mut client = connect(&self.0).await?;
        let prefix = self.0.key("drained/");
        let options = GetOptions::new().with_prefix();
        let found = call("reading who is drained", client.get(prefix.as_str(), Some(options))).await?;
        let drained = found.kvs().iter().filter_map(|kv| {
            let worker = kv.key_str().ok()?.strip_prefix(&prefix)?.to_owned();
            Some((worker, String::from_utf8_lossy(kv.value()).into_owned()))
        });
        Ok(Records { drained: drained.collect() })
    }

    async fn write_mark(&self, worker: &str, drained: Option<&str>) -> Result<(), EtcdError> {
        let mut client = connect(&self.0).await?;
        let key = self.0.key(&format!("drained/{worker}"));
        match drained {
            Some(why) => call("writing who is drained", client.put(key, why, None)).await.map(drop),
            None => call("writing who is drained", client.delete(key, None)).await.map(drop),
        }
    }
}

#[async_trait]
impl Keeper for InEtcd {
    async fn read(&self) -> Result<Records, RecordError> {
        self.all().await.map_err(|error| RecordError(error.to_string()))
    }

    async fn mark(&self, worker: &str, drained: Option<&str>) -> Result<(), RecordError> {
        self.write_mark(worker, drained).await.map_err(|error| RecordError(error.to_string()))
    }
}
