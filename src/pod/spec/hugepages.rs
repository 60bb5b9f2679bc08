//! Limits of huge pages.

use crate::HostFacts;
use crate::error::{Result, SpecError, quoted};
use crate::resources::{FIELD, wrong};
use oci_spec::runtime::LinuxHugepageLimit;
use slipway_proto::cri;
use std::collections::BTreeSet;

/// A container's limits by size of page.
pub(crate) fn of_container(
    request: &mut cri::LinuxContainerResources,
    host: &HostFacts,
) -> Result<Option<Vec<LinuxHugepageLimit>>> {
    let mut limits = Vec::new();
    let mut seen = BTreeSet::new();
    for (i, wanted) in request.hugepage_limits.iter().enumerate() {
        let field = format!("hugepage_limits[{i}]");
        let size = wanted.page_size.as_str();
        let allowed = "the size of a page such as 2MB or 1GB";
        let name = size_name(size).ok_or_else(|| wrong(&field, quoted(size), allowed))?;
        if !host.hugepage_sizes.contains(&name) {
            if wanted.limit == 0 {
                continue;
            }
            let known: Vec<&str> = host.hugepage_sizes.iter().map(String::as_str).collect();
            let what = format!("this host has no huge pages of {size}, but {known:?}");
            return Err(SpecError::invalid(format!("{FIELD}.{field}"), what));
        }
        let limit = i64::try_from(wanted.limit)
            .map_err(|_| wrong(&field, wanted.limit, "less than 2^63 bytes"))?;
        if !seen.insert(name.clone()) {
            return Err(wrong(&field, quoted(size), "named once"));
        }
        let mut out = LinuxHugepageLimit::default();
        out.set_page_size(name).set_limit(limit);
        limits.push(out);
    }
    if !host.hugetlb && !limits.is_empty() {
        if limits.iter().any(|limit| limit.limit() != 0) {
            let what = "this host has no hugetlb cgroup controller; enable it, or drop the limits";
            return Err(SpecError::precondition(
                format!("{FIELD}.hugepage_limits"),
                what,
            ));
        }
        // The kubelet sends these to forbid every size to every container: no news for a log.
        request.hugepage_limits.clear();
        return Ok(None);
    }
    Ok((!limits.is_empty()).then_some(limits))
}

/// `2MB` as cgroup files name it.
fn size_name(size: &str) -> Option<String> {
    let split = size.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = size.split_at(split);
    let count: u64 = digits
        .parse()
        .ok()
        .filter(|count| (1..=1 << 20).contains(count))?;
    let kilobytes = match unit {
        "KB" => count,
        "MB" => count << 10,
        "GB" => count << 20,
        _ => return None,
    };
    Some(crate::host::hugepage_name(kilobytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SpecErrorKind::{FailedPrecondition, Invalid};
    use crate::resources::tests::{host, limits};

    type Request = cri::LinuxContainerResources;

    fn pages(limits: &[(&str, u64)]) -> Request {
        let limit = |(size, limit): &(&str, u64)| cri::HugepageLimit {
            page_size: (*size).to_owned(),
            limit: *limit,
        };
        Request {
            hugepage_limits: limits.iter().map(limit).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn huge_pages() {
        let (found, _) = limits(&pages(&[("2MB", 1 << 21), ("1024MB", 0)]), &host()).expect("good");
        let list = found.oci.hugepage_limits().clone().expect("limits");
        let pairs: Vec<_> = list
            .iter()
            .map(|l| (l.page_size().as_str(), l.limit()))
            .collect();
        assert_eq!(pairs, [("2MB", 1 << 21), ("1GB", 0)]);
        // A size that there isn't needs no limit.
        let (found, _) = limits(&pages(&[("64KB", 0)]), &host()).expect("good");
        assert_eq!(found.oci.hugepage_limits(), &None);
        for bad in [
            ("64KB", 1),
            ("2MiB", 0),
            ("MB", 0),
            ("2", 0),
            ("0MB", 0),
            ("2MB", u64::MAX),
        ] {
            assert_eq!(
                limits(&pages(&[bad]), &host()).expect_err(bad.0).kind(),
                Invalid,
                "{bad:?}"
            );
        }
        assert!(limits(&pages(&[("1GB", 0), ("1024MB", 0)]), &host()).is_err());
        let without = HostFacts {
            hugetlb: false,
            ..host()
        };
        let (found, _) = limits(&pages(&[("2MB", 0)]), &without).expect("good");
        assert_eq!(found.oci.hugepage_limits(), &None);
        assert!(found.effective.hugepage_limits.is_empty());
        let error = limits(&pages(&[("2MB", 1 << 21)]), &without).expect_err("no controller");
        assert_eq!(error.kind(), FailedPrecondition);
    }
}
