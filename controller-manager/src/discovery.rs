//! Which resources the API server serves: the preferred version of each, with its verbs. Asked afresh by those who need
//! it; nothing is cached, since custom resources come and go.

use std::borrow::Cow;

use apimachinery::controller::ResourceId;
use kube::Client;
use kube::core::discovery::v2::{APIGroupDiscovery, APIResourceDiscovery};

#[derive(Clone, Debug, PartialEq)]
pub struct ServedResource {
    pub id: ResourceId,
    pub namespaced: bool,
    pub verbs: Vec<String>,
}

impl ServedResource {
    pub fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|have| have == verb)
    }
}

/// What discovery found, and the group versions that could not be asked now.
#[derive(Debug, Default)]
pub struct Discovered {
    pub resources: Vec<ServedResource>,
    pub stale: Vec<String>,
}

/// Asks the server for all resources.
pub async fn discover(client: &Client) -> kube::Result<Discovered> {
    let mut discovered = Discovered::default();
    for groups in [client.list_core_api_versions_aggregated().await?, client.list_api_groups_aggregated().await?] {
        for group in groups.items {
            add_group(&mut discovered, group);
        }
    }
    Ok(discovered)
}

fn add_group(discovered: &mut Discovered, group: APIGroupDiscovery) {
    let name = group.metadata.and_then(|meta| meta.name).unwrap_or_default();
    let mut seen: Vec<String> = Vec::new();
    // Versions come in the order of preference: the first that has a resource is the one to use.
    for version in group.versions {
        let version_name = version.version.unwrap_or_default();
        if version.freshness.as_deref() == Some("Stale") {
            discovered.stale.push(format!("{name}/{version_name}"));
        }
        for resource in version.resources {
            let Some(served) = served(&name, &version_name, resource) else { continue };
            if !seen.iter().any(|plural| *plural == served.id.plural) {
                seen.push(served.id.plural.to_string());
                discovered.resources.push(served);
            }
        }
    }
}

fn served(group: &str, version: &str, resource: APIResourceDiscovery) -> Option<ServedResource> {
    let kind = resource.response_kind.as_ref().and_then(|kind| kind.kind.clone())?;
    Some(ServedResource {
        id: ResourceId {
            group: Cow::Owned(group.to_owned()),
            version: Cow::Owned(version.to_owned()),
            plural: Cow::Owned(resource.resource?),
            kind: Cow::Owned(kind),
        },
        namespaced: resource.scope.as_deref() == Some("Namespaced"),
        verbs: resource.verbs,
    })
}
