//! Who owns what: objects that match an owner's selector and have no managing owner are adopted, owned ones that no
//! longer match are released.

use std::sync::Arc;

use apimachinery::controller::{Object, ObjectKey, Write, controller_of};
use serde_json::json;

use super::selector::Selector;
use super::{controller_reference, is_deleted, labels, uid};

/// The outcome of looking at all candidates.
pub struct Claim<K> {
    /// The objects that belong to the owner, newly adopted ones included.
    pub mine: Vec<Arc<K>>,
    /// Patches that adopt and release; they must precede all other writes, which rely on them.
    pub writes: Vec<Write>,
}

/// Sorts out which candidates belong to the owner.
pub fn claim<K: Object, O: Object>(owner: &O, selector: &Selector, candidates: Vec<Arc<K>>) -> Claim<K> {
    let mut claim = Claim { mine: Vec::new(), writes: Vec::new() };
    let owner_uid = uid(owner.meta());
    let owner_goes = is_deleted(owner.meta());
    for object in candidates {
        let meta = object.meta();
        let matches = selector.matches(labels(meta));
        match controller_of(meta) {
            Some(reference) if reference.uid == owner_uid => {
                if matches {
                    claim.mine.push(object);
                } else if !owner_goes {
                    claim.writes.push(release(object.as_ref(), owner_uid));
                }
            }
            Some(_) => {}
            None if matches && !owner_goes && !is_deleted(meta) => {
                claim.writes.push(adopt(object.as_ref(), owner));
                claim.mine.push(object);
            }
            None => {}
        }
    }
    claim
}

fn adopt<K: Object, O: Object>(object: &K, owner: &O) -> Write {
    let patch = json!({"metadata": {"uid": object.meta().uid, "ownerReferences": [controller_reference(owner)]}});
    Write::strategic_patch::<K>(ObjectKey::of(object.meta()), patch)
}

/// Takes the owner's reference away; the uid in the patch keeps it from hitting a successor of the same name.
pub fn release<K: Object>(object: &K, owner_uid: &str) -> Write {
    let reference = json!([{"$patch": "delete", "uid": owner_uid}]);
    let patch = json!({"metadata": {"uid": object.meta().uid, "ownerReferences": reference}});
    Write::strategic_patch::<K>(ObjectKey::of(object.meta()), patch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::{apps::v1::ReplicaSet, core::v1::Pod};

    #[test]
    fn matching_orphans_are_adopted_and_strangers_released() {
        let owner: ReplicaSet = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "ns", "uid": "me"}, "spec": {"selector": {"matchLabels": {"app": "web"}}}
        }))
        .unwrap();
        let pod = |name: &str, app: &str, owner: Option<&str>, deleted: bool| -> Arc<Pod> {
            let owners: Vec<_> = owner
                .map(|uid| json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": uid, "controller": true}))
                .into_iter()
                .collect();
            let deletion = deleted.then_some("2026-01-01T00:00:00Z");
            Arc::new(
                serde_json::from_value(json!({"metadata": {"name": name, "uid": name, "labels": {"app": app},
                    "ownerReferences": owners, "deletionTimestamp": deletion}}))
                .unwrap(),
            )
        };
        let candidates = vec![
            pod("mine", "web", Some("me"), false),
            pod("relabelled", "db", Some("me"), false),
            pod("orphan", "web", None, false),
            pod("going", "web", None, true),
            pod("foreign", "web", Some("other"), false),
        ];
        let claim = claim(&owner, &Selector::of(Some(&owner.spec.selector)), candidates);
        let names: Vec<_> = claim.mine.iter().map(|pod| pod.metadata.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["mine", "orphan"]);
        let patched: Vec<_> = claim.writes.iter().map(|write| write.name.as_str()).collect();
        assert_eq!(patched, ["relabelled", "orphan"]);
    }
}
