//! Writes a set of files into a volume so that readers see all of the old or all of the new content, never a mix.
//!
//! Layout, as upstream's and known to programs that watch it:
//!
//! ```text
//! volume/..2026_11_24_10_00_00.123   the files of one generation
//! volume/..data -> ..2026_11_24_10_00_00.123   replaced by rename: the switch
//! volume/name -> ..data/name         what the container opens
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use nix::unistd::{Gid, Uid, chown};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub bytes: Vec<u8>,
    pub mode: u32,
    /// Owner, where it is not root.
    pub uid: Option<u32>,
}

/// Relative paths and their content.
pub type Payload = BTreeMap<String, File>;

#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    #[error("invalid path {0:?} in a volume")]
    Path(String),
    #[error("cannot {step} {path}")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
}

fn failed(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PayloadError {
    let path = path.to_owned();
    move |source| PayloadError::Io { step, path, source }
}

fn check(path: &str) -> Result<(), PayloadError> {
    let mut components = Path::new(path).components();
    let plain = components.all(|part| matches!(part, Component::Normal(_)));
    if path.is_empty() || !plain || path.starts_with("..") {
        return Err(PayloadError::Path(path.to_owned()));
    }
    Ok(())
}

/// Brings `volume` to `payload`; true if anything changed. `gid` is the pod's fsGroup.
pub fn write(volume: &Path, payload: &Payload, gid: Option<u32>) -> Result<bool, PayloadError> {
    for path in payload.keys() {
        check(path)?;
    }
    let old = fs::read_link(volume.join(DATA)).ok();
    if old.is_some() && is_same(volume, payload) {
        return Ok(false);
    }
    let now = Timestamp::now();
    let generation = format!("..{}.{}", now.strftime("%Y_%m_%d_%H_%M_%S"), now.subsec_nanosecond());
    let directory = volume.join(&generation);
    make_directory(&directory, gid)?;
    for (path, file) in payload {
        write_file(&directory, path, file, gid)?;
    }
    let new_link = volume.join(DATA_NEW);
    match fs::remove_file(&new_link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &new_link)(error)),
        _ => {}
    }
    symlink(&generation, &new_link).map_err(failed("link", &new_link))?;
    fs::rename(&new_link, volume.join(DATA)).map_err(failed("switch to", &directory))?;
    link_names(volume, payload)?;
    for entry in fs::read_dir(volume).map_err(failed("list", volume))?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("..2") && *name != *generation {
            fs::remove_dir_all(entry.path()).map_err(failed("remove", &entry.path()))?;
        }
    }
    Ok(true)
}

fn is_same(volume: &Path, payload: &Payload) -> bool {
    let data = volume.join(DATA);
    let mut found = BTreeSet::new();
    collect(&data, &data, &mut found);
    found.len() == payload.len()
        && payload.iter().all(|(path, file)| {
            found.contains(path) && fs::read(data.join(path)).is_ok_and(|bytes| bytes == file.bytes)
        })
}

fn collect(root: &Path, directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(root, &path, found);
        } else if let Ok(relative) = path.strip_prefix(root) {
            found.insert(relative.to_string_lossy().into_owned());
        }
    }
}

fn make_directory(path: &Path, gid: Option<u32>) -> Result<(), PayloadError> {
    fs::create_dir_all(path).map_err(failed("create", path))?;
    let mode = if gid.is_some() { 0o2775 } else { 0o755 };
    own(path, None, gid)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", path))
}

fn own(path: &Path, uid: Option<u32>, gid: Option<u32>) -> Result<(), PayloadError> {
    if uid.is_none() && gid.is_none() {
        return Ok(());
    }
    chown(path, uid.map(Uid::from_raw), gid.map(Gid::from_raw)).map_err(|errno| failed("chown", path)(errno.into()))
}

fn write_file(root: &Path, path: &str, file: &File, gid: Option<u32>) -> Result<(), PayloadError> {
    let target = root.join(path);
    let mut directory = root.to_owned();
    for part in Path::new(path).parent().into_iter().flat_map(Path::components) {
        directory.push(part);
        make_directory(&directory, gid)?;
    }
    fs::write(&target, &file.bytes).map_err(failed("write", &target))?;
    own(&target, file.uid, gid)?;
    let mode = if gid.is_some() { file.mode | 0o440 } else { file.mode };
    fs::set_permissions(&target, fs::Permissions::from_mode(mode)).map_err(failed("set the mode of", &target))
}

/// Makes the links for the first parts of all paths and removes those that nothing stands behind any more.
fn link_names(volume: &Path, payload: &Payload) -> Result<(), PayloadError> {
    let first = |path: &str| path.split('/').next().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = payload.keys().map(|path| first(path)).collect();
    for name in &names {
        let link = volume.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), &link).map_err(failed("link", &link))?;
        }
    }
    for entry in fs::read_dir(volume).map_err(failed("list", volume))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("..") && !names.contains(&name) {
            fs::remove_file(entry.path()).map_err(failed("remove", &entry.path()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(path, text)| ((*path).to_owned(), File { bytes: text.as_bytes().to_vec(), mode: 0o640, uid: None }))
            .collect()
    }

    #[test]
    fn content_is_switched_as_a_whole() {
        let volume = tempfile::tempdir().unwrap();
        let path = volume.path();
        assert!(write(path, &payload(&[("a", "1"), ("d/b", "2")]), None).unwrap());
        assert!(!write(path, &payload(&[("a", "1"), ("d/b", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(path.join("d/b")).unwrap(), "2");
        assert_eq!(fs::metadata(path.join("a")).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(write(path, &payload(&[("d/b", "3"), ("c", "4")]), None).unwrap());
        assert!(!path.join("a").exists());
        assert_eq!(fs::read_to_string(path.join("d/b")).unwrap(), "3");
        let generations =
            fs::read_dir(path).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with("..2"));
        assert_eq!(generations.count(), 1);
    }

    #[test]
    fn paths_cannot_leave_the_volume() {
        let volume = tempfile::tempdir().unwrap();
        for bad in ["", "/etc/x", "../x", "a/../../x", "..data"] {
            assert!(
                matches!(write(volume.path(), &payload(&[(bad, "")]), None), Err(PayloadError::Path(_))),
                "{bad:?}"
            );
        }
    }
}
