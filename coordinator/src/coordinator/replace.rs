//! Serving another model, or the same one in another format: by another engine, beside the one that there is where devices
//! are free for it, and after it where not. What is in progress ends on the old one.

use std::sync::{Arc, PoisonError};

use tokio::sync::{oneshot, watch};

use super::{AdminError, Coordinator, Reign, Replacement, serve::Ready};
use crate::{
    cluster::{
        History,
        discovery::{Discovery, discover},
        leadership::Leadership,
    },
    config::Deployment,
    engine::{self, Observer, Snapshot, State},
};

impl Coordinator {
    /// Serves another deployment, or goes on with the one that there is; whether either is served.
    pub(super) async fn replaced(
        &self,
        reign: &mut Reign,
        leadership: &watch::Receiver<Leadership>,
        Replacement { deployment, reply }: Replacement,
        observer: &Observer,
    ) -> bool {
        let term = reign.term;
        let mut theirs = leadership.clone();
        let deposed = theirs.wait_for(|now| now.term() != Some(term));
        let (outcome, is_served) = tokio::select! {
            outcome = self.replace(reign, &deployment, observer) => outcome,
            Ok(_) = deposed => {
                let why = "another coordinator leads".to_owned();
                (Err(AdminError::NotServing(why)), true)
            }
        };
        self.shared.session.hold(false);
        // Who asked may have gone.
        let _ = reply.send(outcome);
        is_served
    }

    async fn replace(
        &self,
        reign: &mut Reign,
        deployment: &Deployment,
        observer: &Observer,
    ) -> (Result<(), AdminError>, bool) {
        let found = match discover(&self.members().answering(), deployment).await {
            Ok(found) => found,
            Err(error) => return (Err(error.into()), true),
        };
        let mut free = found.clone();
        free.leave_out(&self.shared.claims.plans());
        if free.plan(deployment).is_ok() {
            return (self.beside(reign, free, deployment, observer).await, true);
        }
        // Before anything is given up.
        match self.ready(found, deployment, observer).await {
            Ok(ready) => self.after(reign, ready, observer).await,
            Err(error) => (Err(error.into()), true),
        }
    }

    /// Brings a deployment up on free devices while the other one serves; then new requests go to it.
    async fn beside(
        &self,
        reign: &mut Reign,
        free: Discovery,
        deployment: &Deployment,
        observer: &Observer,
    ) -> Result<(), AdminError> {
        let history = self.history_of(&free);
        let ready = self.ready(free, deployment, observer).await?;
        let (own, _seen) = watch::channel(Snapshot { state: State::Starting, ..Snapshot::default() });
        let mut spawned = self.spawn(reign.term, ready, own, history.clone(), observer);
        spawned.up().await?;
        self.check(&mut spawned, observer).await?;
        let (back, seen) = watch::channel(Snapshot::default());
        reign.engine.show(back).await;
        spawned.engine.show(self.shared.snapshot.clone()).await;
        self.shared.session.open(spawned.served);
        *self.shared.history.lock().unwrap_or_else(PoisonError::into_inner) = history;
        let new = spawned.engine.handle().clone();
        let mut old = std::mem::replace(&mut reign.engine, spawned.engine);
        let unused = reign.unused.replace(spawned.unused);
        tokio::spawn(async move {
            retire(&mut old, unused).await;
            drop(seen);
            // One that is gone needs no devices.
            let _ = new.send(engine::Event::Freed);
        });
        Ok(())
    }

    /// Ends the deployment that is served when what is in progress has ended, and brings the other one up; meanwhile
    /// requests wait. If it does not come up, there is the one before again, or none.
    async fn after(
        &self,
        reign: &mut Reign,
        ready: Ready,
        observer: &Observer,
    ) -> (Result<(), AdminError>, bool) {
        let before = self.deployed().deployment.clone();
        let old_history = self.history();
        self.shared.session.hold(true);
        self.shared.session.close();
        retire(&mut reign.engine, reign.unused.take()).await;
        let history = self.history_of(ready.found());
        *self.shared.history.lock().unwrap_or_else(PoisonError::into_inner) = history;
        let error = match self.serve(reign.term, ready, observer).await {
            Ok((engine, unused)) => {
                (reign.engine, reign.unused) = (engine, Some(unused));
                return (Ok(()), true);
            }
            Err(error) => error,
        };
        tracing::warn!("{error}; going back to what was deployed before");
        self.shared.session.close();
        *self.shared.history.lock().unwrap_or_else(PoisonError::into_inner) = old_history;
        let again = async {
            let found = discover(&self.members().answering(), &before).await?;
            let ready = self.ready(found, &before, observer).await?;
            self.serve(reign.term, ready, observer).await
        };
        match again.await {
            Ok((engine, unused)) => {
                (reign.engine, reign.unused) = (engine, Some(unused));
                (Err(error.into()), true)
            }
            Err(worse) => {
                tracing::error!("{worse}");
                (Err(error.into()), false)
            }
        }
    }

    /// What is known of a model's weights: nothing yet, if it is another one.
    fn history_of(&self, found: &Discovery) -> Arc<History> {
        let history = self.history();
        let is_it = {
            let weights = history.weights.lock().unwrap_or_else(PoisonError::into_inner);
            weights.is_of(&found.profile.fingerprint)
        };
        if is_it { history } else { Arc::default() }
    }
}

/// Ends an engine when nobody asks it any more and what it computes has ended.
async fn retire(engine: &mut engine::Running, unused: Option<oneshot::Receiver<()>>) {
    if let Some(unused) = unused {
        // That there is nobody is said by a sender that is dropped.
        let _ = unused.await;
    }
    engine.retire();
    engine.ended().await;
}
