//! Controller revisions: the history of templates that daemon sets and stateful sets keep, one object per template.

use std::sync::Arc;

use apimachinery::controller::{Informer, Object, Write};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::runtime::RawExtension;
use kube::api::ObjectMeta;
use serde_json::{Value, json};

use super::hash::template_hash;
use super::{controller_reference, name, namespace, uid};

pub const REVISION_LABEL: &str = "controller-revision-hash";

/// The revisions of an owner and which of them is the current template's.
pub struct History {
    /// All revisions, oldest first, the current one included.
    pub all: Vec<Arc<ControllerRevision>>,
    pub current: ControllerRevision,
    /// Creates the current revision or makes it the newest.
    pub write: Option<Write>,
}

/// Finds the revision of the template, or makes one.
pub fn history<O: Object>(
    owner: &O,
    template: &PodTemplateSpec,
    collisions: Option<i32>,
    revisions: &Informer<ControllerRevision>,
) -> History {
    let mut all = revisions.owned_by(uid(owner.meta()));
    all.sort_by_key(|revision| (revision.revision, name(&revision.metadata).to_owned()));
    let data = data_of(template);
    let newest = all.last().and_then(|revision| revision.revision).unwrap_or(0);
    // The last equal one counts: a rollback makes an old revision the newest again.
    if let Some(equal) = all.iter().rev().find(|revision| revision.data.0 == data) {
        let mut current = equal.as_ref().clone();
        let is_newest = current.revision == Some(newest);
        current.revision = Some(if is_newest { newest } else { newest + 1 });
        let write = (!is_newest).then(|| Write::update(&current));
        return History { all, current, write };
    }
    let hash = template_hash(template, collisions);
    let mut labels = template.metadata.as_ref().and_then(|meta| meta.labels.clone()).unwrap_or_default();
    labels.insert(REVISION_LABEL.to_owned(), hash.clone());
    let current = ControllerRevision {
        metadata: ObjectMeta {
            name: Some(format!("{}-{hash}", name(owner.meta()))),
            namespace: Some(namespace(owner.meta()).to_owned()),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference(owner)]),
            ..ObjectMeta::default()
        },
        data: RawExtension(data),
        revision: Some(newest + 1),
    };
    let write = Some(Write::create(&current).if_absent());
    History { all, current, write }
}

/// The template as a patch of its owner that replaces the whole template.
fn data_of(template: &PodTemplateSpec) -> Value {
    let mut template = serde_json::to_value(template).unwrap_or_default();
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

/// The template that a revision holds.
pub fn template_of(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    let mut template = revision.data.0.get("spec")?.get("template")?.clone();
    template.as_object_mut()?.remove("$patch");
    serde_json::from_value(template).ok()
}

/// The hash that the revision's pods carry.
pub fn hash_of(revision: &ControllerRevision) -> &str {
    super::labels(&revision.metadata).get(REVISION_LABEL).map_or("", String::as_str)
}

/// Deletes revisions that nothing uses beyond the limit, oldest first.
pub fn truncate(history: &History, limit: i32, in_use: impl Fn(&ControllerRevision) -> bool) -> Vec<Write> {
    let current = name(&history.current.metadata);
    let unused: Vec<_> = history.all.iter().filter(|r| name(&r.metadata) != current && !in_use(r)).collect();
    let surplus = unused.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    unused[..surplus].iter().map(|revision| Write::delete(revision.as_ref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::controller::Verb;
    use k8s_openapi::api::apps::v1::DaemonSet;

    #[test]
    fn a_template_has_one_revision_and_going_back_makes_it_the_newest() {
        let owner: DaemonSet = serde_json::from_value(
            json!({"metadata": {"name": "d", "namespace": "ns", "uid": "d"}, "spec": {"selector": {}, "template": {}}}),
        )
        .unwrap();
        let template = |image: &str| -> PodTemplateSpec {
            serde_json::from_value(
                json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": image}]}}),
            )
            .unwrap()
        };
        let stored = |history: &History| history.current.clone();
        let first = history(&owner, &template("1"), None, &Informer::fixed([]));
        assert_eq!((first.current.revision, first.write.as_ref().unwrap().verb.clone()), (Some(1), Verb::Create));
        let second = history(&owner, &template("2"), None, &Informer::fixed([stored(&first)]));
        assert_eq!(second.current.revision, Some(2));
        let both = Informer::fixed([stored(&first), stored(&second)]);
        assert!(history(&owner, &template("2"), None, &both).write.is_none());
        let back = history(&owner, &template("1"), None, &both);
        assert_eq!((back.current.revision, name(&back.current.metadata)), (Some(3), name(&first.current.metadata)));
        assert_eq!(template_of(&first.current), Some(template("1")));
        assert_eq!(truncate(&back, 0, |_| false).len(), 1);
        assert_eq!(truncate(&back, 0, |_| true).len(), 0);
    }
}
