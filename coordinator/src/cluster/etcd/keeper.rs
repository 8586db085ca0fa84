//! Records in etcd. They change rarely, so each call has a connection of its own.

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp, TxnOpResponse};
use tonic::async_trait;

use super::{
    config::Etcd,
    connection::{call, connect},
    error::EtcdError,
};
use crate::cluster::records::{DeploymentRecord, Keeper, RecordError, Records};

/// Key of what is deployed.
const DEPLOYMENT: &str = "deployment";

/// Keeps records under the keys of a cluster.
#[derive(Debug, Clone)]
pub struct InEtcd(Etcd);

impl InEtcd {
    /// Records of this cluster.
    pub fn new(etcd: &Etcd) -> Self {
        InEtcd(etcd.clone())
    }

    /// Everything, as of one moment.
    async fn all(&self) -> Result<Records, EtcdError> {
        let mut client = connect(&self.0).await?;
        let (prefix, key) = (self.0.key("drained/"), self.0.key(DEPLOYMENT));
        let read = Txn::new().and_then([
            TxnOp::get(prefix.as_str(), Some(GetOptions::new().with_prefix())),
            TxnOp::get(key.as_str(), None),
        ]);
        let answer = call("reading what was decided", client.txn(read)).await?;
        let mut records = Records::default();
        for response in answer.op_responses() {
            let TxnOpResponse::Get(found) = response else { continue };
            for kv in found.kvs() {
                let found = kv.key_str().unwrap_or_default();
                if let Some(worker) = found.strip_prefix(&prefix) {
                    let why = String::from_utf8_lossy(kv.value()).into_owned();
                    records.drained.insert(worker.to_owned(), why);
                } else {
                    let nonsense = |why: String| EtcdError::Nonsense { key: key.clone(), why };
                    let record = serde_json::from_slice(kv.value())
                        .map_err(|error| nonsense(format!("no deployment: {error}")))?;
                    let version = u64::try_from(kv.mod_revision()).unwrap_or_default();
                    records.deployed = Some((version, record));
                }
            }
        }
        Ok(records)
    }

    /// Writes a deployment if nobody else has since `over`; its version, which is the revision of that.
    async fn write_deployment(&self, record: &DeploymentRecord, over: u64) -> Result<Option<u64>, EtcdError> {
        let mut client = connect(&self.0).await?;
        let key = self.0.key(DEPLOYMENT);
        // Strings and numbers alone: this cannot fail.
        let value = serde_json::to_vec(record).unwrap_or_default();
        let over = i64::try_from(over).unwrap_or(i64::MAX);
        let unless_changed = Txn::new()
            .when([Compare::mod_revision(key.as_str(), CompareOp::Equal, over)])
            .and_then([TxnOp::put(key.as_str(), value, None)]);
        let answer = call("recording a deployment", client.txn(unless_changed)).await?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(answer.succeeded().then(|| u64::try_from(revision).unwrap_or_default()))
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
        self.all().await.map_err(|error| RecordError::Unkept(error.to_string()))
    }

    async fn mark(&self, worker: &str, drained: Option<&str>) -> Result<(), RecordError> {
        self.write_mark(worker, drained).await.map_err(|error| RecordError::Unkept(error.to_string()))
    }

    async fn deploy(&self, record: &DeploymentRecord, over: u64) -> Result<u64, RecordError> {
        let written = self.write_deployment(record, over).await;
        written.map_err(|error| RecordError::Unkept(error.to_string()))?.ok_or(RecordError::Outrun)
    }
}
