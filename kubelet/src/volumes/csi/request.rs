//! What is asked of a driver for one volume of one pod, from the API's objects. Pure.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, CSIVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, SecretReference,
};
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec};

use super::api::{self, Capabilities, Capability, access};
use super::layout::{VolumeId, inline_handle};

/// Where a pod's volume comes from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// Lives and dies with the pod.
    Inline(&'a CSIVolumeSource),
    Persistent(&'a PersistentVolume, &'a CSIPersistentVolumeSource),
}

/// A volume that a pod wants to have published.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    pub pod: &'a Pod,
    /// The volume's name in the pod.
    pub volume: &'a str,
    pub source: Source<'a>,
    /// The claim on a persistent volume.
    pub claim: Option<&'a PersistentVolumeClaim>,
    pub read_only: bool,
}

impl<'a> Wanted<'a> {
    pub fn driver(&self) -> &'a str {
        match self.source {
            Source::Inline(source) => &source.driver,
            Source::Persistent(_, source) => &source.driver,
        }
    }

    pub fn uid(&self) -> &'a str {
        crate::pod::runtime_uid(self.pod)
    }

    /// The name under which the volume is kept in the pod's directory.
    pub fn name(&self) -> &'a str {
        match self.source {
            Source::Inline(_) => self.volume,
            Source::Persistent(volume, _) => volume.metadata.name.as_deref().unwrap_or_default(),
        }
    }

    pub fn id(&self) -> VolumeId {
        let handle = match self.source {
            Source::Inline(_) => inline_handle(self.uid(), self.volume),
            Source::Persistent(_, source) => source.volume_handle.clone(),
        };
        VolumeId { driver: self.driver().to_owned(), handle }
    }

    pub fn mode(&self) -> &'static str {
        match self.source {
            Source::Inline(_) => "Ephemeral",
            Source::Persistent(..) => "Persistent",
        }
    }

    pub fn fs_type(&self) -> String {
        match self.source {
            Source::Inline(source) => source.fs_type.clone(),
            Source::Persistent(_, source) => source.fs_type.clone(),
        }
        .unwrap_or_default()
    }

    fn access_modes(&self) -> &'a [String] {
        match self.source {
            Source::Inline(_) => &[],
            Source::Persistent(volume, _) => {
                volume.spec.as_ref().and_then(|spec| spec.access_modes.as_deref()).unwrap_or_default()
            }
        }
    }

    pub fn publish_secret(&self) -> Option<SecretReference> {
        match self.source {
            Source::Inline(source) => source.node_publish_secret_ref.as_ref().map(|reference| SecretReference {
                name: Some(reference.name.clone()),
                namespace: self.pod.metadata.namespace.clone(),
            }),
            Source::Persistent(_, source) => source.node_publish_secret_ref.clone(),
        }
    }

    pub fn attributes(&self) -> BTreeMap<String, String> {
        match self.source {
            Source::Inline(source) => source.volume_attributes.clone(),
            Source::Persistent(_, source) => source.volume_attributes.clone(),
        }
        .unwrap_or_default()
    }

    /// The group that the pod's volumes belong to.
    pub fn group(&self) -> Option<u32> {
        let security = self.pod.spec.as_ref()?.security_context.as_ref()?;
        security.fs_group.and_then(|group| u32::try_from(group).ok())
    }

    /// Leave the files alone if the root is the group's already.
    pub fn only_on_mismatch(&self) -> bool {
        let security = self.pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
        security.and_then(|security| security.fs_group_change_policy.as_deref()) == Some("OnRootMismatch")
    }

    /// How the driver is to mount it. A driver that gives the volume to a group itself is told the group.
    pub fn capability(&self, known: &Capabilities) -> api::VolumeCapability {
        let options = match self.source {
            Source::Inline(_) => None,
            Source::Persistent(volume, _) => volume.spec.as_ref().and_then(|spec| spec.mount_options.clone()),
        };
        let group = self.group().filter(|_| known.has(Capability::VolumeMountGroup));
        api::VolumeCapability {
            mount: Some(api::MountVolume {
                fs_type: self.fs_type(),
                mount_flags: options.unwrap_or_default(),
                volume_mount_group: group.map(|group| group.to_string()).unwrap_or_default(),
            }),
            access_mode: Some(api::AccessMode { mode: access_mode(self.access_modes(), known) }),
            ..api::VolumeCapability::default()
        }
    }

    /// Whether the kubelet gives the volume's files to the pod's group.
    pub fn gives_to_group(&self, policy: &str, known: &Capabilities) -> bool {
        if self.group().is_none() || self.read_only || known.has(Capability::VolumeMountGroup) {
            return false;
        }
        let single = |mode: &String| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod";
        match (policy, self.source) {
            ("None", _) => false,
            ("File", _) => true,
            (_, Source::Inline(_)) => !self.fs_type().is_empty(),
            (_, Source::Persistent(..)) => !self.fs_type().is_empty() && self.access_modes().iter().any(single),
        }
    }

    /// What drivers that ask for it learn about the pod.
    pub fn pod_info(&self) -> [(String, String); 5] {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let metadata = &self.pod.metadata;
        let account = self.pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        [
            ("pod.name", text(&metadata.name)),
            ("pod.namespace", text(&metadata.namespace)),
            ("pod.uid", text(&metadata.uid)),
            ("serviceAccount.name", account.unwrap_or_default()),
            ("ephemeral", matches!(self.source, Source::Inline(_)).to_string()),
        ]
        .map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value))
    }
}

fn access_mode(modes: &[String], known: &Capabilities) -> i32 {
    let multi = known.has(Capability::SingleNodeMultiWriter);
    match (modes.first().map_or("ReadWriteOnce", String::as_str), multi) {
        ("ReadWriteOnce", true) => access::SINGLE_NODE_MULTI_WRITER,
        ("ReadWriteOncePod", true) => access::SINGLE_NODE_SINGLE_WRITER,
        ("ReadWriteOnce" | "ReadWriteOncePod", false) => access::SINGLE_NODE_WRITER,
        ("ReadOnlyMany", _) => access::MULTI_NODE_READER_ONLY,
        ("ReadWriteMany", _) => access::MULTI_NODE_MULTI_WRITER,
        _ => access::UNKNOWN,
    }
}

/// What the cluster knows about a driver; the object is optional.
pub struct Policy(Option<CSIDriverSpec>);

/// A volume that the driver cannot serve as the cluster describes it.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("volume mode {mode:?} not supported by driver {driver} (no CSIDriver object)")]
    NoObject { mode: &'static str, driver: String },
    #[error("volume mode {mode:?} not supported by driver {driver} (only supports {supported:?})")]
    Mode { mode: &'static str, driver: String, supported: Vec<String> },
}

impl Policy {
    pub fn of(driver: Option<CSIDriver>) -> Self {
        Self(driver.map(|driver| driver.spec))
    }

    fn is(&self, field: impl Fn(&CSIDriverSpec) -> Option<bool>) -> bool {
        self.0.as_ref().and_then(field).unwrap_or(false)
    }

    /// Volumes have to be attached unless the driver says otherwise.
    pub fn attaches(&self) -> bool {
        self.0.as_ref().and_then(|spec| spec.attach_required).unwrap_or(true)
    }

    pub fn wants_pod_info(&self) -> bool {
        self.is(|spec| spec.pod_info_on_mount)
    }

    /// Volumes are published again from time to time.
    pub fn republishes(&self) -> bool {
        self.is(|spec| spec.requires_republish)
    }

    pub fn tokens_in_secrets(&self) -> bool {
        self.is(|spec| spec.service_account_token_in_secrets)
    }

    /// Audiences of the tokens that the driver wants, and how many seconds they are to be good for.
    pub fn tokens(&self) -> Vec<(String, Option<i64>)> {
        let requests = self.0.iter().flat_map(|spec| spec.token_requests.iter().flatten());
        requests.map(|request| (request.audience.clone(), request.expiration_seconds)).collect()
    }

    pub fn group_policy(&self) -> &str {
        self.0.as_ref().and_then(|spec| spec.fs_group_policy.as_deref()).unwrap_or("ReadWriteOnceWithFSType")
    }

    pub fn check(&self, wanted: &Wanted<'_>) -> Result<(), PolicyError> {
        let (mode, driver) = (wanted.mode(), wanted.driver().to_owned());
        match &self.0 {
            None if mode == "Persistent" => Ok(()),
            None => Err(PolicyError::NoObject { mode, driver }),
            Some(spec) => {
                let supported = spec.volume_lifecycle_modes.clone().unwrap_or_else(|| vec!["Persistent".to_owned()]);
                if supported.iter().any(|supported| supported == mode) {
                    return Ok(());
                }
                Err(PolicyError::Mode { mode, driver, supported })
            }
        }
    }
}

/// The API's maps as the protocol's.
pub fn map(map: BTreeMap<String, String>) -> HashMap<String, String> {
    map.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn capable(of: &[Capability]) -> Capabilities {
        let capability = |of: &Capability| api::NodeCapability { rpc: Some(api::RpcCapability { r#type: *of as i32 }) };
        Capabilities { capabilities: of.iter().map(capability).collect() }
    }

    fn volume(modes: &[&str], fs_type: &str) -> PersistentVolume {
        let csi = json!({"driver": "d", "volumeHandle": "h", "fsType": fs_type});
        let spec = json!({"accessModes": modes, "csi": csi, "mountOptions": ["noatime"]});
        serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": spec})).unwrap()
    }

    fn pod() -> Pod {
        let spec = json!({"containers": [], "serviceAccountName": "s", "securityContext": {"fsGroup": 7}});
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec})).unwrap()
    }

    fn wanted<'a>(pod: &'a Pod, volume: &'a PersistentVolume) -> Wanted<'a> {
        let source = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()).unwrap();
        Wanted { pod, volume: "v", source: Source::Persistent(volume, source), claim: None, read_only: false }
    }

    #[test]
    fn access_modes_depend_on_the_driver() {
        let modes = |mode: &str| [mode.to_owned()];
        let (plain, multi) = (capable(&[]), capable(&[Capability::SingleNodeMultiWriter]));
        for (mode, on_plain, on_multi) in [
            ("ReadWriteOnce", access::SINGLE_NODE_WRITER, access::SINGLE_NODE_MULTI_WRITER),
            ("ReadWriteOncePod", access::SINGLE_NODE_WRITER, access::SINGLE_NODE_SINGLE_WRITER),
            ("ReadOnlyMany", access::MULTI_NODE_READER_ONLY, access::MULTI_NODE_READER_ONLY),
            ("ReadWriteMany", access::MULTI_NODE_MULTI_WRITER, access::MULTI_NODE_MULTI_WRITER),
            ("Odd", access::UNKNOWN, access::UNKNOWN),
        ] {
            assert_eq!((access_mode(&modes(mode), &plain), access_mode(&modes(mode), &multi)), (on_plain, on_multi));
        }
    }

    #[test]
    fn groups() {
        let pod = pod();
        let none = capable(&[]);
        for (modes, fs_type, policy, want) in [
            (&["ReadWriteOnce"][..], "ext4", "ReadWriteOnceWithFSType", true),
            (&["ReadWriteOnce"], "", "ReadWriteOnceWithFSType", false),
            (&["ReadWriteMany"], "ext4", "ReadWriteOnceWithFSType", false),
            (&["ReadWriteMany"], "", "File", true),
            (&["ReadWriteOnce"], "ext4", "None", false),
        ] {
            let volume = volume(modes, fs_type);
            assert_eq!(wanted(&pod, &volume).gives_to_group(policy, &none), want, "{modes:?} {fs_type} {policy}");
        }
        let volume = volume(&["ReadWriteOnce"], "ext4");
        let own = capable(&[Capability::VolumeMountGroup]);
        assert!(!wanted(&pod, &volume).gives_to_group("File", &own));
        let mount = wanted(&pod, &volume).capability(&own).mount.unwrap();
        assert_eq!((mount.volume_mount_group.as_str(), mount.mount_flags), ("7", vec!["noatime".to_owned()]));
    }

    #[test]
    fn drivers_serve_the_modes_that_they_name() {
        let driver = |modes: serde_json::Value| {
            let spec = json!({"volumeLifecycleModes": modes});
            Policy::of(Some(serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()))
        };
        let (pod, volume) = (pod(), volume(&[], ""));
        let source = CSIVolumeSource { driver: "d".into(), ..CSIVolumeSource::default() };
        let persistent = wanted(&pod, &volume);
        let inline = Wanted { source: Source::Inline(&source), ..persistent };
        let both = driver(json!(["Persistent", "Ephemeral"]));
        let unknown = Policy::of(None);
        for (policy, wanted, want) in [
            (&both, &persistent, None),
            (&both, &inline, None),
            (&unknown, &persistent, None),
            (&unknown, &inline, Some(r#"volume mode "Ephemeral" not supported by driver d (no CSIDriver object)"#)),
            (
                &driver(json!(["Persistent"])),
                &inline,
                Some(r#"volume mode "Ephemeral" not supported by driver d (only supports ["Persistent"])"#),
            ),
        ] {
            let error = policy.check(wanted).err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), want);
        }
        assert!(unknown.attaches());
        let told = inline.pod_info();
        assert_eq!(told[4], ("csi.storage.k8s.io/ephemeral".to_owned(), "true".to_owned()));
        assert_eq!(inline.id().handle, inline_handle("u", "v"));
    }
}
