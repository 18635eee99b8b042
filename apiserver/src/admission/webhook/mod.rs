//! Admission by webhooks: `MutatingAdmissionWebhook` asks one after another and applies the patches they answer with,
//! `ValidatingAdmissionWebhook` asks all at once. Which are asked is decided in `hook`, what is said in `review`, how it
//! travels in `http::webhook`. Nothing here knows what a resource means.

pub mod hook;
pub mod review;

use std::sync::Arc;

use apimachinery::status::{Result, Status};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use futures::stream::{FuturesUnordered, StreamExt};
use serde_json::Value;

use super::{AdmissionRequest, Operation, Plugin};
use crate::cache::Stored;
use crate::http::webhook::{CallError, Clients};
use crate::server::Server;
use hook::{Hook, Matched};

const GROUP: &str = "admissionregistration.k8s.io";

/// The webhooks of one kind of configuration, compiled once per change.
struct Hooks {
    resource: &'static str,
    compiled: ArcSwap<Compiled>,
    clients: Clients,
}

#[derive(Default)]
struct Compiled {
    /// Name and revision of each configuration.
    of: Vec<(String, u64)>,
    hooks: Vec<Arc<Hook>>,
}

impl Hooks {
    fn new(resource: &'static str) -> Self {
        Self { resource, compiled: ArcSwap::default(), clients: Clients::default() }
    }

    /// In the order in which they are asked: of the configurations by name, then as written there.
    fn current(&self, server: &Server) -> Arc<Compiled> {
        let Some(cache) = server.caches.get(GROUP, self.resource) else { return Arc::default() };
        if cache.is_empty() {
            return Arc::default();
        }
        let mut configurations = cache.list(None);
        configurations.sort_by(|a, b| a.name().cmp(b.name()));
        let compiled = self.compiled.load_full();
        let is_same =
            |(known, stored): (&(String, u64), &Arc<Stored>)| known.0 == stored.name() && known.1 == stored.revision;
        if compiled.of.len() == configurations.len() && compiled.of.iter().zip(&configurations).all(is_same) {
            return compiled;
        }
        let of = configurations.iter().map(|stored| (stored.name().to_owned(), stored.revision)).collect();
        let hooks = configurations.iter().flat_map(|stored| Hook::read_all(&stored.value())).map(Arc::new).collect();
        let compiled = Arc::new(Compiled { of, hooks });
        self.compiled.store(compiled.clone());
        compiled
    }

    /// What a failed call means: the request fails, or goes on as if nobody had been asked.
    fn failed(hook: &Hook, error: &CallError) -> Result<()> {
        let error = apimachinery::process::error_chain(error);
        if hook.ignores_failure {
            tracing::warn!(webhook = hook.name, error, "a webhook failed and is ignored, as its failurePolicy says");
            return Ok(());
        }
        Err(Status::internal(format!("failed calling webhook {:?}: {error}", hook.name)))
    }
}

/// Which webhooks have seen the object of a request, and which must see it again because it changed afterwards.
#[derive(Default)]
pub struct Reinvocation {
    pub is_again: bool,
    /// The object changed after a webhook that wants to know has seen it.
    pub is_wanted: bool,
    asked: Vec<String>,
    again: Vec<String>,
    /// As the webhooks left it.
    last: Option<Value>,
}

impl Reinvocation {
    /// Begins the second round.
    pub fn begin_again(&mut self) {
        self.is_again = true;
        self.is_wanted = false;
    }

    fn want_again(&mut self) {
        for key in self.asked.drain(..) {
            if !self.again.contains(&key) {
                self.again.push(key);
            }
        }
        self.is_wanted = !self.again.is_empty();
    }
}

pub struct MutatingAdmissionWebhook(Hooks);

impl Default for MutatingAdmissionWebhook {
    fn default() -> Self {
        Self(Hooks::new("mutatingwebhookconfigurations"))
    }
}

#[async_trait]
impl Plugin for MutatingAdmissionWebhook {
    fn name(&self) -> &'static str {
        "MutatingAdmissionWebhook"
    }

    fn handles(&self, _: Operation) -> bool {
        true
    }

    async fn admit(&self, server: &Arc<Server>, request: &mut AdmissionRequest<'_>) -> Result<()> {
        let compiled = self.0.current(server);
        if compiled.hooks.is_empty() || hook::is_exempt(request.gvr) {
            return Ok(());
        }
        if request.reinvocation.is_again && request.reinvocation.last.as_ref() != Some(&*request.object) {
            request.reinvocation.want_again();
        }
        for hook in &compiled.hooks {
            if request.reinvocation.is_again && !request.reinvocation.again.contains(&hook.key) {
                continue;
            }
            let Some(matched) = hook.matches(server, request)? else { continue };
            let before = request.object.clone();
            self.ask(server, hook, &matched, request).await?;
            if *request.object != before {
                request.reinvocation.want_again();
            }
            if hook.wants_again && !request.reinvocation.is_again {
                request.reinvocation.asked.push(hook.key.clone());
            }
        }
        request.reinvocation.last = Some(request.object.clone());
        Ok(())
    }
}

impl MutatingAdmissionWebhook {
    async fn ask(
        &self,
        server: &Arc<Server>,
        hook: &Hook,
        matched: &Matched,
        request: &mut AdmissionRequest<'_>,
    ) -> Result<()> {
        review::check_dry_run(hook, request)?;
        let asked = review::ask(server, &self.0.clients, hook, matched, request).await;
        let answer = match asked {
            Ok(answer) => answer,
            Err(error) => return Hooks::failed(hook, &error),
        };
        answer.warnings.iter().for_each(|text| request.warnings.add(text));
        if !answer.allowed {
            return Err(review::denied(&hook.name, answer.status));
        }
        let Some(patch) = answer.patch else { return Ok(()) };
        match review::patched(matched, request, &patch) {
            Ok(object) => {
                *request.object = object;
                Ok(())
            }
            Err(error) => Err(Status::internal(error)),
        }
    }
}

pub struct ValidatingAdmissionWebhook(Hooks);

impl Default for ValidatingAdmissionWebhook {
    fn default() -> Self {
        Self(Hooks::new("validatingwebhookconfigurations"))
    }
}

#[async_trait]
impl Plugin for ValidatingAdmissionWebhook {
    fn name(&self) -> &'static str {
        "ValidatingAdmissionWebhook"
    }

    fn handles(&self, _: Operation) -> bool {
        true
    }

    async fn validate(&self, server: &Arc<Server>, request: &AdmissionRequest<'_>) -> Result<()> {
        let compiled = self.0.current(server);
        if compiled.hooks.is_empty() || hook::is_exempt(request.gvr) {
            return Ok(());
        }
        self.ask_all(server, &compiled.hooks, request).await
    }
}

impl ValidatingAdmissionWebhook {
    /// The first refusal ends it; the answers of the others are not waited for.
    async fn ask_all(&self, server: &Arc<Server>, hooks: &[Arc<Hook>], request: &AdmissionRequest<'_>) -> Result<()> {
        let mut chosen = Vec::new();
        for hook in hooks {
            if let Some(matched) = hook.matches(server, request)? {
                review::check_dry_run(hook, request)?;
                chosen.push((hook, matched));
            }
        }
        let mut asked: FuturesUnordered<_> = chosen
            .iter()
            .map(|(hook, matched)| async move {
                (*hook, review::ask(server, &self.0.clients, hook, matched, request).await)
            })
            .collect();
        while let Some((hook, answer)) = asked.next().await {
            match answer {
                Ok(answer) => {
                    answer.warnings.iter().for_each(|text| request.warnings.add(text));
                    if !answer.allowed {
                        return Err(review::denied(&hook.name, answer.status));
                    }
                }
                Err(error) => Hooks::failed(hook, &error)?,
            }
        }
        Ok(())
    }
}
