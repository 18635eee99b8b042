//! The few mounts that the kubelet makes itself: memory-backed volumes and sub-paths. What is mounted is read from
//! `/proc/self/mountinfo`, so that nothing has to be remembered.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

#[derive(Debug, thiserror::Error)]
pub enum MountError {
    #[error("cannot read the mount table")]
    Table(#[source] io::Error),
    #[error("cannot mount {what} on {target}")]
    Mount { what: &'static str, target: PathBuf, source: io::Error },
    #[error("cannot unmount {target}")]
    Unmount { target: PathBuf, source: io::Error },
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("subPath {path:?} leads out of its volume or cannot be opened")]
    SubPath { path: String, source: io::Error },
}

/// Mount points at or below `root`, the deepest first.
pub fn mounts_below(root: &Path) -> Result<Vec<PathBuf>, MountError> {
    let table = fs::read("/proc/self/mountinfo").map_err(MountError::Table)?;
    let mut found: Vec<PathBuf> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|path| path.starts_with(root))
        .collect();
    found.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    Ok(found)
}

/// The kernel writes blanks and backslashes in paths as `\ooo`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.filter(|_| *byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(*byte);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// A tmpfs on `target` unless there is a mount already; `size` in bytes, zero for the kernel's default.
pub fn tmpfs(target: &Path, size: u64) -> Result<(), MountError> {
    if mounts_below(target)?.iter().any(|mounted| mounted == target) {
        return Ok(());
    }
    let options = if size > 0 { format!("size={size},mode=0777") } else { "mode=0777".to_owned() };
    mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
        .map_err(|errno| MountError::Mount { what: "a tmpfs", target: target.to_owned(), source: errno.into() })
}

/// Unmounts everything at and below `root`.
pub fn unmount_below(root: &Path) -> Result<(), MountError> {
    for target in mounts_below(root)? {
        umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| MountError::Unmount { target: target.clone(), source: errno.into() })?;
    }
    Ok(())
}

/// Binds `volume/sub_path` to `target` so that no symbolic link inside the volume can lead out of it, not even one that
/// is exchanged at the same time. A directory is created when nothing is there.
pub fn bind_sub_path(volume: &Path, sub_path: &str, target: &Path) -> Result<(), MountError> {
    let failed = |source: io::Error| MountError::SubPath { path: sub_path.to_owned(), source };
    let plain = Path::new(sub_path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain {
        return Err(failed(io::Error::from(io::ErrorKind::InvalidInput)));
    }
    if mounts_below(target)?.iter().any(|mounted| mounted == target) {
        return Ok(());
    }
    if fs::metadata(volume.join(sub_path)).is_err() && fs::symlink_metadata(volume.join(sub_path)).is_err() {
        create_below(volume, sub_path).map_err(failed)?;
    }
    let root = fs::File::open(volume).map_err(failed)?;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
    let opened = openat2(&root, sub_path, how).map_err(|errno| failed(errno.into()))?;
    let source = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    let is_directory = fs::metadata(&source).map_err(failed)?.is_dir();
    prepare_target(target, is_directory)?;
    mount(Some(&source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|errno| MountError::Mount { what: "a subPath", target: target.to_owned(), source: errno.into() })
}

/// Creates the directories of `sub_path` one by one, each opened beneath the one before.
fn create_below(volume: &Path, sub_path: &str) -> io::Result<()> {
    let mut directory = std::os::fd::OwnedFd::from(fs::File::open(volume)?);
    for part in Path::new(sub_path).components() {
        let Component::Normal(name) = part else { continue };
        match nix::sys::stat::mkdirat(&directory, name, Mode::from_bits_truncate(0o777)) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let how = OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_BENEATH);
        directory = openat2(&directory, name, how)?;
    }
    Ok(())
}

fn prepare_target(target: &Path, is_directory: bool) -> Result<(), MountError> {
    let failed = |source| MountError::Create { path: target.to_owned(), source };
    if is_directory {
        return fs::create_dir_all(target).map_err(failed);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    fs::OpenOptions::new().create(true).append(true).open(target).map(drop).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_escapes() {
        assert_eq!(unescape(b"/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape(b"/a\\"), PathBuf::from("/a\\"));
    }

    #[test]
    fn a_sub_path_that_leads_out_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let volume = root.path().join("v");
        fs::create_dir(&volume).unwrap();
        std::os::unix::fs::symlink("/etc", volume.join("out")).unwrap();
        for path in ["../x", "/etc", "out", "out/passwd"] {
            let result = bind_sub_path(&volume, path, &root.path().join("t"));
            assert!(matches!(result, Err(MountError::SubPath { .. })), "{path}: {result:?}");
        }
    }
}
