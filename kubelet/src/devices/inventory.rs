//! Which devices there are, and whose they are. Pure: told by plugins and by the pods' workers, asked by everybody.

use std::collections::{BTreeMap, BTreeSet};

use super::api::{self, Client, ContainerAllocated, Options};
use crate::node::status::Offered;

pub type Ids = BTreeSet<String>;

/// A container of a pod, by the pod's uid and the container's name.
pub type Owner = (String, String);

/// A device by its NUMA nodes; none when they do not matter.
type Device = Vec<i64>;

/// A plugin that serves a resource now.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Tells one registration from the next.
    pub number: u64,
    pub client: Client,
    pub options: Options,
}

/// One kind of device, by the resource's name.
#[derive(Clone, Debug, Default)]
struct Resource {
    healthy: BTreeMap<String, Device>,
    unhealthy: BTreeMap<String, Device>,
    /// The newest last. None: the plugin has gone, but may come back.
    endpoints: Vec<Endpoint>,
    /// How often a plugin has come.
    registrations: u64,
    /// It did not come back: the node has none of these devices.
    is_gone: bool,
}

/// What a container got of one resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Share {
    /// Devices by NUMA node; [`NO_NODE`] for those that are on none in particular.
    pub devices: BTreeMap<i64, Vec<String>>,
    pub response: ContainerAllocated,
}

pub const NO_NODE: i64 = -1;

impl Share {
    pub fn ids(&self) -> Ids {
        self.devices.values().flatten().cloned().collect()
    }
}

/// Why a container cannot have the devices that it asks for; the texts are upstream's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    #[error("cannot allocate unregistered device {0}")]
    Unregistered(String),
    #[error("no healthy devices present; cannot allocate unhealthy devices {0}")]
    Unhealthy(String),
    #[error("requested number of devices unavailable for {resource}. Requested: {needed}, Available: {available}")]
    TooFew { resource: String, needed: usize, available: usize },
    #[error("pod {pod:?} container {container:?} changed request for resource {resource:?} from {had} to {wanted}")]
    Changed { pod: String, container: String, resource: String, had: usize, wanted: usize },
}

/// What can be given to a container of one resource.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Given anyway: devices that an init container of the pod has had.
    pub certain: Ids,
    /// The others are chosen from these.
    pub free: Ids,
    pub needed: usize,
}

impl Choice {
    pub fn is_done(&self) -> bool {
        self.certain.len() == self.needed
    }

    /// The devices to give: those that are certain, then those that the plugin prefers, then the first of the others.
    pub fn pick(&self, preferred: &[String]) -> Ids {
        let mut picked = self.certain.clone();
        let preferred = preferred.iter().filter(|id| self.free.contains(*id));
        for id in preferred.chain(&self.free) {
            if picked.len() == self.needed {
                break;
            }
            picked.insert(id.clone());
        }
        picked
    }
}

#[derive(Debug, Default)]
pub struct Inventory {
    resources: BTreeMap<String, Resource>,
    shares: BTreeMap<Owner, BTreeMap<String, Share>>,
}

impl Inventory {
    /// A plugin has registered.
    pub fn connect(&mut self, resource: &str, endpoint: Endpoint) {
        let resource = self.resources.entry(resource.to_owned()).or_default();
        resource.endpoints.push(endpoint);
        resource.registrations += 1;
        resource.is_gone = false;
    }

    /// A plugin has told which devices it has.
    pub fn update(&mut self, resource: &str, devices: Vec<api::Device>) {
        let Some(resource) = self.resources.get_mut(resource) else { return };
        resource.healthy.clear();
        resource.unhealthy.clear();
        for device in devices {
            let nodes = device.topology.into_iter().flat_map(|topology| topology.nodes).map(|node| node.id).collect();
            let list = if device.health == api::HEALTHY { &mut resource.healthy } else { &mut resource.unhealthy };
            list.insert(device.id, nodes);
        }
    }

    /// A plugin has gone. True when nobody serves the resource any more.
    pub fn disconnect(&mut self, resource: &str, number: u64) -> bool {
        let Some(resource) = self.resources.get_mut(resource) else { return false };
        resource.endpoints.retain(|endpoint| endpoint.number != number);
        if !resource.endpoints.is_empty() {
            return false;
        }
        let healthy = std::mem::take(&mut resource.healthy);
        resource.unhealthy.extend(healthy);
        true
    }

    /// Devices known from an earlier process, whose plugin has not registered again.
    pub fn expect(&mut self, resource: &str) {
        self.resources.entry(resource.to_owned()).or_default();
    }

    /// How often a plugin of the resource has come until now.
    pub fn registrations(&self, resource: &str) -> u64 {
        self.resources.get(resource).map_or(0, |resource| resource.registrations)
    }

    /// The resource's plugin has had the time to come back, since it had come `registrations` times.
    pub fn expire(&mut self, resource: &str, registrations: u64) {
        let Some(resource) = self.resources.get_mut(resource) else { return };
        if resource.endpoints.is_empty() && resource.registrations == registrations {
            *resource = Resource { is_gone: true, registrations, ..Resource::default() };
        }
    }

    pub fn endpoint(&self, resource: &str) -> Option<Endpoint> {
        self.resources.get(resource)?.endpoints.last().cloned()
    }

    /// Whether the resource is one of devices: of a plugin that has been here, or given to somebody.
    pub fn knows(&self, resource: &str) -> bool {
        let known = self.resources.get(resource).is_some_and(|resource| !resource.is_gone);
        known || self.shares.values().any(|shares| shares.contains_key(resource))
    }

    /// What the node's status says. A resource that has gone is there with none.
    pub fn offered(&self) -> Offered {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        let mut offered = Offered::default();
        for (name, resource) in &self.resources {
            let (healthy, unhealthy) = (count(resource.healthy.len()), count(resource.unhealthy.len()));
            offered.capacity.insert(name.clone(), healthy + unhealthy);
            offered.allocatable.insert(name.clone(), healthy);
        }
        offered
    }

    /// Resources with their devices that can be used, for the checkpoint.
    pub fn registered(&self) -> BTreeMap<String, Vec<String>> {
        let here = self.resources.iter().filter(|(_, resource)| !resource.is_gone);
        here.map(|(name, resource)| (name.clone(), resource.healthy.keys().cloned().collect())).collect()
    }

    /// Devices that can be used, with their NUMA nodes, by resource.
    pub fn usable(&self) -> impl Iterator<Item = (&str, &str, &[i64])> {
        let resources = self.resources.iter();
        resources.flat_map(|(name, resource)| {
            resource.healthy.iter().map(|(id, nodes)| (name.as_str(), id.as_str(), nodes.as_slice()))
        })
    }

    pub fn shares(&self, owner: &Owner) -> Option<&BTreeMap<String, Share>> {
        self.shares.get(owner)
    }

    pub fn all_shares(&self) -> &BTreeMap<Owner, BTreeMap<String, Share>> {
        &self.shares
    }

    fn used(&self, resource: &str) -> Ids {
        self.shares.values().filter_map(|shares| shares.get(resource)).flat_map(Share::ids).collect()
    }

    /// What a container can be given; `None` when it has what it needs.
    pub fn choose(
        &self,
        owner: &Owner,
        resource: &str,
        needed: usize,
        reusable: &Ids,
    ) -> Result<Option<Choice>, Shortage> {
        if let Some(share) = self.shares.get(owner).and_then(|shares| shares.get(resource)) {
            let had = share.ids().len();
            let (pod, container) = owner.clone();
            return match had == needed {
                true => Ok(None),
                false => Err(Shortage::Changed { pod, container, resource: resource.to_owned(), had, wanted: needed }),
            };
        }
        let known = self.resources.get(resource).filter(|resource| !resource.endpoints.is_empty());
        let known = known.ok_or_else(|| Shortage::Unregistered(resource.to_owned()))?;
        if known.healthy.is_empty() {
            return Err(Shortage::Unhealthy(resource.to_owned()));
        }
        let certain: Ids = reusable.iter().take(needed).cloned().collect();
        let used = self.used(resource);
        let free: Ids = known.healthy.keys().filter(|id| !used.contains(*id)).cloned().collect();
        let missing = needed - certain.len();
        if free.len() < missing {
            let resource = resource.to_owned();
            return Err(Shortage::TooFew { resource, needed: missing, available: free.len() });
        }
        Ok((needed > 0).then_some(Choice { certain, free, needed }))
    }

    /// The devices are the container's from now on.
    pub fn give(&mut self, owner: &Owner, resource: &str, ids: &Ids, response: ContainerAllocated) {
        let known = self.resources.get(resource);
        let mut devices: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for id in ids {
            let nodes = known.and_then(|known| known.healthy.get(id).or_else(|| known.unhealthy.get(id)));
            let nodes = nodes.filter(|nodes| !nodes.is_empty()).cloned().unwrap_or_else(|| vec![NO_NODE]);
            for node in nodes {
                devices.entry(node).or_default().push(id.clone());
            }
        }
        self.restore(owner.clone(), resource.to_owned(), Share { devices, response });
    }

    /// As [`Inventory::give`], for what an earlier process has given.
    pub fn restore(&mut self, owner: Owner, resource: String, share: Share) {
        self.shares.entry(owner).or_default().insert(resource, share);
    }

    /// Takes the devices back from every pod that is not to be kept. True when that changed anything.
    pub fn retain_pods(&mut self, keep: impl Fn(&str) -> bool) -> bool {
        let before = self.shares.len();
        self.shares.retain(|(pod, _), _| keep(pod));
        self.shares.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(number: u64) -> Endpoint {
        Endpoint { number, client: Client::at("/nowhere".as_ref()), options: Options::default() }
    }

    fn device(id: &str, healthy: bool, nodes: &[i64]) -> api::Device {
        let health = if healthy { api::HEALTHY } else { "Unhealthy" }.to_owned();
        let nodes = nodes.iter().map(|id| api::NumaNode { id: *id }).collect();
        api::Device { id: id.into(), health, topology: Some(api::Topology { nodes }) }
    }

    fn owner(container: &str) -> Owner {
        ("u".to_owned(), container.to_owned())
    }

    fn ids(ids: &[&str]) -> Ids {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn offered(inventory: &Inventory) -> (i64, i64) {
        let offered = inventory.offered();
        (offered.capacity["r/x"], offered.allocatable["r/x"])
    }

    #[tokio::test]
    async fn devices_come_and_go() {
        let mut inventory = Inventory::default();
        assert!(!inventory.knows("r/x"));
        inventory.connect("r/x", endpoint(1));
        inventory.update("r/x", vec![device("a", true, &[]), device("b", false, &[]), device("c", true, &[1])]);
        assert_eq!(offered(&inventory), (3, 2));
        // The next version of the plugin registers before the last one goes.
        inventory.connect("r/x", endpoint(2));
        assert!(!inventory.disconnect("r/x", 1));
        inventory.expire("r/x", 2);
        assert_eq!(offered(&inventory), (3, 2));
        assert!(inventory.disconnect("r/x", 2));
        assert_eq!(offered(&inventory), (3, 0));
        assert!(inventory.knows("r/x"));
        // It has come back and gone again since.
        inventory.expire("r/x", 1);
        assert_eq!(offered(&inventory), (3, 0));
        inventory.expire("r/x", 2);
        assert_eq!(offered(&inventory), (0, 0));
        assert!(!inventory.knows("r/x"));
    }

    #[tokio::test]
    async fn what_is_given_is_not_free() {
        let mut inventory = Inventory::default();
        let none = Ids::new();
        let choose = |inventory: &Inventory, container: &str, needed| {
            inventory.choose(&owner(container), "r/x", needed, &none).map_err(|shortage| shortage.to_string())
        };
        assert_eq!(choose(&inventory, "a", 1), Err("cannot allocate unregistered device r/x".to_owned()));
        inventory.connect("r/x", endpoint(1));
        let unhealthy = "no healthy devices present; cannot allocate unhealthy devices r/x";
        assert_eq!(choose(&inventory, "a", 1), Err(unhealthy.to_owned()));
        inventory.update("r/x", vec![device("1", true, &[0, 1]), device("2", true, &[]), device("3", false, &[])]);
        let choice = choose(&inventory, "a", 1).unwrap().unwrap();
        assert_eq!(choice.free, ids(&["1", "2"]));
        inventory.give(&owner("a"), "r/x", &ids(&["1"]), ContainerAllocated::default());
        let share = &inventory.shares(&owner("a")).unwrap()["r/x"];
        assert_eq!(share.devices, BTreeMap::from([(0, vec!["1".to_owned()]), (1, vec!["1".to_owned()])]));
        assert_eq!(choose(&inventory, "a", 1), Ok(None));
        assert!(choose(&inventory, "a", 2).unwrap_err().contains("changed request for resource \"r/x\" from 1 to 2"));
        let few = "requested number of devices unavailable for r/x. Requested: 2, Available: 1";
        assert_eq!(choose(&inventory, "b", 2), Err(few.to_owned()));
        // What an init container of the pod has had can be had again.
        let choice = inventory.choose(&owner("b"), "r/x", 2, &ids(&["1"])).unwrap().unwrap();
        assert_eq!(choice.pick(&[]), ids(&["1", "2"]));
        assert!(inventory.retain_pods(|pod| pod != "u"));
        assert_eq!(choose(&inventory, "b", 2).unwrap().unwrap().free, ids(&["1", "2"]));
    }

    #[test]
    fn plugins_may_prefer_what_is_free() {
        let choice = Choice { certain: ids(&["9"]), free: ids(&["1", "2", "3"]), needed: 3 };
        assert!(!choice.is_done());
        let text = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        assert_eq!(choice.pick(&text(&["3", "7"])), ids(&["1", "3", "9"]));
        assert_eq!(choice.pick(&text(&["3", "2", "1"])), ids(&["2", "3", "9"]));
        assert_eq!(choice.pick(&[]), ids(&["1", "2", "9"]));
    }
}
