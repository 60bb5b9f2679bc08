//! SELinux levels of pods: two categories for each that no other pod of this node has, so that one pod's
//! containers can't touch another's files (MCS).

use std::collections::HashMap;

use parking_lot::Mutex;

/// How many categories policies have.
const CATEGORIES: u16 = 1024;

type Pair = (u16, u16);

/// Who has which level.
#[derive(Debug, Default)]
pub struct Levels(Mutex<HashMap<Pair, String>>);

impl Levels {
    /// A level for a pod. There are half a million, so some are always left.
    pub fn take(&self, pod: &str) -> String {
        let mut taken = self.0.lock();
        loop {
            let (a, b) = (fastrand::u16(..CATEGORIES), fastrand::u16(..CATEGORIES));
            let pair = (a.min(b), a.max(b));
            if a != b && !taken.contains_key(&pair) {
                taken.insert(pair, pod.to_owned());
                return format!("s0:c{},c{}", pair.0, pair.1);
            }
        }
    }

    /// Remembers the level of a pod that was found. One that is not of our making is nobody's to give.
    pub fn restore(&self, pod: &str, level: &str) {
        if let Some(pair) = pair(level) {
            self.0.lock().insert(pair, pod.to_owned());
        }
    }

    /// A pod is gone.
    pub fn release(&self, pod: &str) {
        self.0.lock().retain(|_, holder| holder != pod);
    }
}

fn pair(level: &str) -> Option<Pair> {
    let (a, b) = level.strip_prefix("s0:c")?.split_once(",c")?;
    let (a, b) = (a.parse().ok()?, b.parse().ok()?);
    (a < b && b < CATEGORIES).then_some((a, b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn levels_are_each_pods_own_until_it_is_gone() {
        let levels = Levels::default();
        let all: HashSet<_> = (0..2000).map(|n| levels.take(&n.to_string())).collect();
        assert_eq!(all.len(), 2000);
        assert!(all.iter().all(|level| pair(level).is_some()));
        for n in 0..2000 {
            levels.release(&n.to_string());
        }
        assert!(levels.0.lock().is_empty());
        levels.restore("p", "s0:c1,c2");
        assert_eq!(levels.0.lock().get(&(1, 2)).map(String::as_str), Some("p"));
        for foreign in [
            "s0",
            "s0:c1",
            "s0:c2,c1",
            "s0:c1,c1024",
            "s1:c1,c2",
            "s0:cx,cy",
            "",
        ] {
            levels.restore("q", foreign);
        }
        assert_eq!(levels.0.lock().len(), 1);
    }
}
