//! What each verb means, one file each. Everything here works for every resource; what differs is in its strategy.
