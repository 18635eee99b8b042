//! What each verb means, one file each. Everything here works for every resource; what differs is in its strategy.
//! Nothing here knows HTTP: requests come in as trees and options, answers go out as trees and stored objects.

pub mod create;
pub mod delete;
pub mod get;
pub mod list;
pub mod metadata;
pub mod patch;
pub mod scale;
pub mod update;

use std::collections::HashSet;
use std::sync::Arc;

use apimachinery::codec;
use apimachinery::merge::apply::{self, Manager};
use apimachinery::meta::GroupVersionKind;
use apimachinery::schema::builtin;
use apimachinery::status::{FieldError, Result, Status};
use serde_json::Value;

use crate::admission::{AdmissionRequest, Operation, Reinvocation, Warnings};
use crate::auth::UserInfo;
use crate::cache::{FreshnessError, Stored};
use crate::registry::core::pod::INTERNAL;
use crate::registry::object::ObjectExt;
use crate::registry::strategy::{Cx, Strategy, Subresource};
use crate::registry::{Resource, Served};
use crate::server::Server;
use crate::storage::StoreError;

const EXTENSIONS: &str = "apiextensions.k8s.io";

/// One operation on one resource, after authorization.
pub struct Call<'a> {
    pub server: &'a Arc<Server>,
    pub user: &'a UserInfo,
    pub resource: Arc<Resource>,
    pub served: Arc<Served>,
    /// Empty for cluster-scoped resources, and for all namespaces.
    pub namespace: String,
    pub name: String,
    pub subresource: String,
    pub options: WriteOptions,
    /// What admission wants the client to know.
    pub warnings: Arc<Warnings>,
}

/// The query parameters of writes, or the options in the body of a delete.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    pub dry_run: bool,
    /// Who owns the fields that are written: `fieldManager`, or else the first word of the user agent.
    pub field_manager: String,
    pub field_validation: FieldValidation,
    /// Of server-side apply.
    pub force: bool,
    /// The write came as a patch.
    pub is_patch: bool,
}

/// What happens to unknown and duplicate fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FieldValidation {
    Ignore,
    #[default]
    Warn,
    Strict,
}

impl FieldValidation {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ignore => "Ignore",
            Self::Warn => "Warn",
            Self::Strict => "Strict",
        }
    }
}

/// The object after a write.
pub struct Written {
    /// In the storage version.
    pub object: Value,
    /// The same as JSON, when it has just been encoded for the store.
    pub text: Option<bytes::Bytes>,
    pub created: bool,
    pub warnings: Vec<String>,
}

impl<'a> Call<'a> {
    /// A call on the resource itself, with default options.
    pub fn new(server: &'a Arc<Server>, user: &'a UserInfo, resource: Arc<Resource>, served: Arc<Served>) -> Self {
        Self {
            server,
            user,
            resource,
            served,
            namespace: String::new(),
            name: String::new(),
            subresource: String::new(),
            options: WriteOptions::default(),
            warnings: Arc::default(),
        }
    }

    pub fn cx(&self) -> Cx<'_> {
        Cx {
            server: self.server,
            user: self.user,
            now: jiff::Timestamp::now(),
            namespace: &self.namespace,
            dry_run: self.options.dry_run,
            subresource: &self.subresource,
            is_patch: self.options.is_patch,
            warnings: &self.warnings,
        }
    }

    /// The strategy of this way of writing: of the resource, or of the subresource that is a view of it.
    pub fn strategy(&self) -> &dyn Strategy {
        if self.subresource.is_empty() {
            return &*self.resource.strategy;
        }
        if let (Some(status), "status") = (&self.resource.status, self.subresource.as_str()) {
            return &**status;
        }
        match self.resource.strategy.subresource(&self.subresource) {
            Some(Subresource::Update(strategy)) => strategy,
            _ => &*self.resource.strategy,
        }
    }

    pub fn key(&self, name: &str) -> String {
        self.resource.cache.key(&self.namespace, name)
    }

    /// What is wrong with the fields of an object of this kind, values printed in the order of their schema.
    pub fn invalid(&self, name: &str, mut errors: Vec<FieldError>) -> Status {
        if let Some(schema) = &self.resource.schema {
            for error in &mut errors {
                codec::show_in_order(error, schema);
            }
        }
        // What several rules complain about is said once.
        let mut said = HashSet::new();
        errors.retain(|error| said.insert(error.to_string()));
        Status::invalid(&self.resource.group_kind(), name, &errors)
    }

    pub fn not_found(&self, name: &str) -> Status {
        Status::not_found(&self.resource.group_resource, name)
    }

    pub fn conflict(&self, name: &str, why: impl std::fmt::Display) -> Status {
        Status::conflict(&self.resource.group_resource, name, why)
    }

    /// Waits until the cache holds everything written before now.
    pub async fn refresh(&self) -> Result<u64> {
        self.server.freshness.reach_present(&self.server.caches).await.map_err(|error| stale(&error))
    }

    /// The object as it was when the call came, or later.
    pub async fn current(&self, name: &str) -> Result<Option<Arc<Stored>>> {
        self.refresh().await?;
        Ok(self.resource.cache.get(&self.namespace, name))
    }

    /// Records who owns the fields of `object`, which is in the storage version, as is `old`.
    fn manage_fields(&self, object: &mut Value, old: Option<&Value>, now: jiff::Timestamp) -> Result<()> {
        let Some(schema) = &self.served.schema else { return Ok(()) };
        // The server's own changes on behalf of a binding or an eviction have no manager.
        if self.subresource == INTERNAL {
            return Ok(());
        }
        let manager = Manager {
            name: &self.options.field_manager,
            api_version: &self.served.gvk.api_version(),
            subresource: &self.subresource,
            time: now,
        };
        let reset = self.strategy().reset_fields();
        if self.served.gvk == self.resource.storage {
            apply::update_managed_fields(schema, old, object, &manager, reset);
            return Ok(());
        }
        // Who owns what is said in the words of the version that was spoken.
        let mut shown = self.resource.present(&self.served, object.clone())?;
        let old = old.map(|old| self.resource.present(&self.served, old.clone())).transpose()?;
        apply::update_managed_fields(schema, old.as_ref(), &mut shown, &manager, reset);
        match shown.metadata_mut().remove("managedFields") {
            Some(fields) => object.metadata_mut().insert("managedFields".into(), fields),
            None => object.metadata_mut().remove("managedFields"),
        };
        Ok(())
    }

    /// Records who asked in what a subresource takes and gives back; only the requests for tokens are shown again.
    pub(crate) fn manage_answer(&self, gvk: &GroupVersionKind, body: &mut Value) {
        if gvk.kind != "TokenRequest" {
            return;
        }
        let Some(schema) = builtin().kind(gvk) else { return };
        let api_version = gvk.api_version();
        let manager = Manager {
            name: &self.options.field_manager,
            api_version: &api_version,
            subresource: &self.subresource,
            time: jiff::Timestamp::now(),
        };
        body.metadata_mut();
        apply::update_managed_fields(schema, None, body, &manager, &[&["status"]]);
    }

    /// Adds what upstream always prints, so that equal objects are equal trees.
    fn complete(&self, object: &mut Value) {
        if let Some(schema) = &self.resource.schema {
            codec::complete(object, schema);
        }
    }

    /// Brings the object into the form that it has when it comes back from the store. Definitions of custom resources
    /// are stored as JSON and come back as they went.
    fn forget_emptiness(&self, object: &mut Value) {
        if let Some(schema) = self.resource.schema.as_ref().filter(|_| self.resource.storage.group != EXTENSIONS) {
            codec::forget_emptiness(object, schema);
        }
    }

    pub(crate) async fn admit(
        &self,
        operation: Operation,
        name: &str,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<()> {
        let mut request = self.admission(operation, name, object, old);
        self.server.admission.admit(self.server, &mut request).await
    }

    pub(crate) async fn validate_admission(
        &self,
        operation: Operation,
        name: &str,
        object: &mut Value,
        old: Option<&Value>,
    ) -> Result<()> {
        let request = self.admission(operation, name, object, old);
        self.server.admission.validate(self.server, &request).await
    }

    fn admission<'b>(
        &'b self,
        operation: Operation,
        name: &'b str,
        object: &'b mut Value,
        old: Option<&'b Value>,
    ) -> AdmissionRequest<'b> {
        AdmissionRequest {
            gvk: &self.served.gvk,
            gvr: &self.served.gvr,
            namespace: &self.namespace,
            name,
            operation,
            subresource: &self.subresource,
            object,
            old,
            user: self.user,
            dry_run: self.options.dry_run,
            options: &self.options,
            warnings: &self.warnings,
            reinvocation: Reinvocation::default(),
        }
    }
}

/// `2026-01-02T03:04:05Z`.
pub fn timestamp(now: jiff::Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What is written to the store: everything but the revision, which the store itself keeps.
fn to_bytes(object: &mut Value) -> Result<bytes::Bytes> {
    object.metadata_mut().remove("resourceVersion");
    serde_json::to_vec(object).map(Into::into).map_err(Status::internal)
}

pub(crate) fn stale(error: &FreshnessError) -> Status {
    match error {
        FreshnessError::Timeout { wanted, reached } => too_large(*wanted, *reached),
        // Nothing was done yet, so that clients may simply ask again, and do when they are told so.
        FreshnessError::Store(_) => Status::too_many_requests(apimachinery::process::error_chain(error), 1),
        error => Status::internal(apimachinery::process::error_chain(error)),
    }
}

/// The answer to a revision that has not happened yet, as far as this server knows.
pub fn too_large(wanted: u64, reached: u64) -> Status {
    let message = format!("Too large resource version: {wanted}, current: {reached}");
    let mut status = Status::gateway_timeout(format!("Timeout: {message}"));
    status.details = Some(Box::new(apimachinery::status::Details {
        retry_after_seconds: 1,
        causes: vec![apimachinery::status::Cause {
            reason: "ResourceVersionTooLarge".into(),
            message: "Too large resource version".into(),
            field: String::new(),
        }],
        ..Default::default()
    }));
    status
}

fn store_failed(error: &StoreError) -> Status {
    match error {
        StoreError::Compacted => Status::expired("The provided resource version is too old."),
        StoreError::Timeout { .. } => {
            let mut status = Status::failure(500, "ServerTimeout", error.to_string());
            status.details =
                Some(Box::new(apimachinery::status::Details { retry_after_seconds: 2, ..Default::default() }));
            status
        }
        error => Status::internal(apimachinery::process::error_chain(error)),
    }
}

fn decode_failed(error: &crate::cache::stored::DecodeStoredError) -> Status {
    Status::internal(apimachinery::process::error_chain(error))
}
