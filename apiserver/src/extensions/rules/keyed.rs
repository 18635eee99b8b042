//! Lists that are sets or maps: their order does not matter when they are compared, and adding one to another merges.

use std::any::Any;

use cel::ExecutionError;
use cel::common::traits::{Adder, Container, Indexer, Iterable, Sizer, Zeroer};
use cel::common::types::{CelList, CelMap, CelMapKey, Type};
use cel::common::value::{Builtin, BuiltinRef, CowVal, StaticVal, Val};

/// To everything but comparing and adding it is the list that it holds.
#[derive(Clone, Debug)]
pub struct KeyedList {
    list: CelList<'static>,
    /// Properties that tell items apart; none when the items are what counts, as in a set.
    keys: Vec<String>,
}

impl KeyedList {
    pub fn new(items: Vec<Box<dyn Val>>, keys: Vec<String>) -> Self {
        Self { list: items.into(), keys }
    }

    /// Whether two items are in the same place.
    fn is_same(&self, left: &dyn Val, right: &dyn Val) -> bool {
        if self.keys.is_empty() {
            return left.equals(right);
        }
        self.keys.iter().all(|key| match (member(left, key), member(right, key)) {
            (Some(left), Some(right)) => left.equals(right),
            (left, right) => left.is_none() && right.is_none(),
        })
    }
}

fn member<'b>(item: &'b dyn Val, key: &'b str) -> Option<&'b dyn Val> {
    let map = item.downcast_ref::<CelMap<'_>>()?;
    map.inner().get(&CelMapKey::from(key)).map(|value| value.as_ref())
}

impl Val for KeyedList {
    fn get_type(&self) -> &Type {
        <Self as Val>::cel_type()
    }

    fn cel_type() -> &'static Type {
        <CelList<'_> as Val>::cel_type()
    }

    fn equals(&self, other: &dyn Val) -> bool {
        let Some(other) = other.downcast_ref::<CelList<'_>>() else { return false };
        let (own, others) = (self.list.inner(), other.inner());
        let matches = |item: &dyn Val| {
            others.iter().any(|other| self.is_same(item, other.as_ref()) && item.equals(other.as_ref()))
        };
        own.len() == others.len() && own.iter().all(|item| matches(item.as_ref()))
    }

    fn as_adder<'b, 'v>(&'b self) -> Option<&'b (dyn Adder + 'v)>
    where
        Self: 'v,
    {
        Some(self)
    }

    fn as_container(&self) -> Option<&dyn Container> {
        self.list.as_container()
    }

    fn as_indexer<'b, 'v>(&'b self) -> Option<&'b (dyn Indexer + 'v)>
    where
        Self: 'v,
    {
        self.list.as_indexer()
    }

    fn into_indexer<'v>(self: Box<Self>) -> Option<Box<dyn Indexer + 'v>>
    where
        Self: 'v,
    {
        Box::new(self.list).into_indexer()
    }

    fn as_iterable<'b, 'v>(&'b self) -> Option<&'b (dyn Iterable + 'v)>
    where
        Self: 'v,
    {
        self.list.as_iterable()
    }

    fn as_sizer(&self) -> Option<&dyn Sizer> {
        self.list.as_sizer()
    }

    fn as_zeroer(&self) -> Option<&dyn Zeroer> {
        self.list.as_zeroer()
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(self.clone())
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn as_builtin<'b, 'v>(&'b self) -> BuiltinRef<'b, 'v>
    where
        Self: 'v,
    {
        self.list.as_builtin()
    }

    fn into_builtin<'v>(self: Box<Self>) -> Option<Builtin<'v>>
    where
        Self: 'v,
    {
        Box::new(self.list).into_builtin()
    }
}

impl StaticVal for KeyedList {}

impl Adder for KeyedList {
    /// What is in both is taken from the right, in the place that it has on the left; the rest of the right follows.
    fn add<'b, 'v>(&'b self, other: &(dyn Val + 'v)) -> Result<CowVal<'b, 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let mut merged: Vec<Box<dyn Val + 'v>> = self.list.inner().iter().map(|item| item.clone_as_boxed()).collect();
        let types = || vec![self.get_type().name().to_owned(), other.get_type().name().to_owned()];
        let overload = || ExecutionError::no_such_overload("_+_", types());
        let mut items = other.as_iterable().ok_or_else(overload)?.iter();
        while let Some(item) = items.next() {
            match merged.iter_mut().find(|known| self.is_same(known.as_ref(), item)) {
                Some(known) => *known = item.clone_as_boxed(),
                None => merged.push(item.clone_as_boxed()),
            }
        }
        Ok(CowVal::owned(CelList::from(merged)))
    }
}
