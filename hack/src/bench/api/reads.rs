//! Requests that only read: one pod, and lists of them, whole and selected.

use anyhow::{Result, ensure};
use bytes::Bytes;
use http::StatusCode;

use super::answers;
use super::client::{Answer, JSON, PROTOBUF, Request};
use super::load::Requests;
use super::objects;
use super::side::Side;
use super::writes::pods;

/// Gets one and the same pod, consistently.
pub struct GetPod {
    name: String,
    /// What every answer must be, byte for byte.
    expected: Bytes,
}

impl GetPod {
    pub async fn new(side: &Side) -> Result<Self> {
        let known = &side.pods[side.pods.len() / 2];
        let answer = side.ask(&Request::get(format!("{}/{}", pods(), known.name))).await?;
        answer.expect(StatusCode::OK)?;
        let item = answers::item(JSON, &answer.body)?;
        ensure!(item.name == known.name && item.uid == known.uid, "the pod is {} {}", item.name, item.uid);
        Ok(Self { name: known.name.clone(), expected: answer.body })
    }
}

impl Requests for GetPod {
    const WORKERS: usize = 8;

    fn request(&self, _: &Side, _: usize) -> Request {
        Request::get(format!("{}/{}", pods(), self.name))
    }

    fn check(&self, _: &Side, _: usize, _: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::OK)?;
        ensure!(answer.body == self.expected, "the pod differs from the first answer: {}", answer.start());
        Ok(())
    }
}

/// Lists all pods, or with a selector every hundredth.
pub struct ListPods {
    pub accept: &'static str,
    pub selected: bool,
}

impl ListPods {
    pub const JSON: Self = Self { accept: JSON, selected: false };
    pub const PROTOBUF: Self = Self { accept: PROTOBUF, selected: false };
    pub const SELECTED: Self = Self { accept: JSON, selected: true };

    /// Which hundredth request `index` selects.
    fn hundredth(index: usize) -> usize {
        index * 37 % 100
    }
}

impl Requests for ListPods {
    const WORKERS: usize = 1;

    fn request(&self, _: &Side, index: usize) -> Request {
        let query = match self.selected {
            true => format!("?labelSelector=pct%3D{}", objects::percent(Self::hundredth(index))),
            false => String::new(),
        };
        Request::get(pods() + &query).accept(self.accept)
    }

    fn check(&self, side: &Side, index: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::OK)?;
        let list = answers::list(self.accept, &answer.body)?;
        let hundredth = self.selected.then_some(Self::hundredth(index));
        check_list(side, hundredth, floor, &list)
    }
}

/// Ten clients list everything at once.
pub struct ParallelLists;

impl Requests for ParallelLists {
    const WORKERS: usize = 10;

    fn request(&self, _: &Side, _: usize) -> Request {
        Request::get(pods())
    }

    fn check(&self, side: &Side, _: usize, floor: u64, answer: &Answer) -> Result<()> {
        answer.expect(StatusCode::OK)?;
        check_list(side, None, floor, &answers::list(JSON, &answer.body)?)
    }
}

/// Every pod that was created and is wanted, in the order of names, and nothing else.
pub fn check_list(side: &Side, hundredth: Option<usize>, floor: u64, list: &answers::List) -> Result<()> {
    ensure!(list.version >= floor, "a consistent list at {}, but {floor} was answered before", list.version);
    let wanted = side.pods.iter().enumerate().filter(|(index, _)| hundredth.is_none_or(|h| index % 100 == h));
    let mut items = list.items.iter();
    for (index, known) in wanted {
        let Some(item) = items.next() else { anyhow::bail!("pod {} is missing", known.name) };
        let is_right = item.name == known.name
            && item.uid == known.uid
            && item.node == known.node
            && item.percent == objects::percent(index)
            && item.version <= list.version;
        ensure!(is_right, "instead of {known:?} the list has {item:?}");
    }
    ensure!(items.next().is_none(), "the list has {} items, more than were created", list.items.len());
    Ok(())
}
