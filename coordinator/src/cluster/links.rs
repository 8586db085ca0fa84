//! Which link two neighbouring stages get, and why.

use strata_proto::{Device, DeviceKind, LinkChoice, LinkKind};

/// One end of a link.
#[derive(Debug, Clone, Copy)]
pub(super) struct End<'a> {
    /// Worker of the stage.
    pub worker: &'a str,
    /// Machine of the worker.
    pub host: &'a str,
    /// Ends with the same hub are in one process.
    pub hub: &'a str,
    /// Device of the stage.
    pub device: &'a Device,
}

/// The best link that both ends can have, or the one that was asked for: device copies before NCCL, NCCL before host
/// memory, and TCP, which is always possible, last.
///
/// # Errors
/// Why they cannot have the one that was asked for.
pub(super) fn choose(from: End<'_>, to: End<'_>, forced: Option<LinkKind>) -> Result<LinkChoice, String> {
    let choice = |kind, why: &str| Ok(LinkChoice { kind, why: why.to_owned() });
    if let Some(kind) = forced {
        return match obstacle(from, to, kind) {
            None => choice(kind, "asked for by --links"),
            Some(why) => Err(why),
        };
    }
    let apart = obstacle(from, to, LinkKind::Loopback);
    let direct = obstacle(from, to, LinkKind::DeviceCopy);
    let one_gpu = !from.device.hardware.is_empty() && from.device.hardware == to.device.hardware;
    if direct.is_none() {
        return choice(
            LinkKind::DeviceCopy,
            if one_gpu { "same process, same GPU" } else { "same process, peer access" },
        );
    }
    // Unless it is made to believe in two machines (NCCL_HOSTID), NCCL refuses one GPU twice in different processes
    // too.
    let nccl = obstacle(from, to, LinkKind::Nccl)
        .or_else(|| one_gpu.then(|| "NCCL does not link a GPU with itself".to_owned()));
    let Some(no_nccl) = nccl else { return choice(LinkKind::Nccl, "NCCL on both") };
    // Between processors nobody expects more.
    let gpus = [from, to].iter().any(|end| end.device.kind == DeviceKind::Cuda);
    let reasons = [apart.clone().or_else(|| gpus.then_some(direct).flatten()), gpus.then_some(no_nccl)];
    let mut why: Vec<String> = apart.is_none().then(|| "same process".to_owned()).into_iter().collect();
    why.extend(reasons.into_iter().flatten());
    why.dedup();
    let kind = if apart.is_none() { LinkKind::Loopback } else { LinkKind::Tcp };
    choice(kind, &why.join(", "))
}

/// Why these ends cannot have a link of this kind, if they cannot.
fn obstacle(from: End<'_>, to: End<'_>, kind: LinkKind) -> Option<String> {
    let apart = (from.hub != to.hub).then(|| "different processes".to_owned());
    let ends = [from, to];
    let no_gpu = || {
        let processor = ends.iter().find(|end| end.device.kind != DeviceKind::Cuda);
        processor.map(|end| format!("{} is no GPU", end.device.id))
    };
    match kind {
        LinkKind::Tcp => None,
        LinkKind::Loopback => apart,
        LinkKind::DeviceCopy => apart.or_else(no_gpu).or_else(|| {
            (!from.device.copies_to(to.device))
                .then(|| format!("no peer access from {} to {}", from.device.id, to.device.id))
        }),
        LinkKind::Nccl => no_gpu()
            .or_else(|| {
                let without = ends.iter().find(|end| !end.device.links.contains(&LinkKind::Nccl));
                without.map(|end| format!("no NCCL on {}/{}", end.host, end.worker))
            })
            .or_else(|| {
                let same = from.hub == to.hub && from.device.hardware == to.device.hardware;
                same.then(|| "NCCL does not link a GPU with itself".to_owned())
            }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, hardware: &str, peers: &[&str], nccl: bool) -> Device {
        Device {
            id: id.into(),
            kind: if hardware.is_empty() { DeviceKind::Cpu } else { DeviceKind::Cuda },
            budget_bytes: 1,
            total_bytes: 1,
            capped: false,
            bytes_per_second: 1.0,
            flops_per_second: 1.0,
            numerics: "test".into(),
            rates: Vec::new(),
            stages_at_once: 0,
            hardware: hardware.into(),
            peers: peers.iter().map(|p| (*p).to_owned()).collect(),
            links: nccl.then_some(LinkKind::Nccl).into_iter().collect(),
            spill_bytes: 0,
            spill_directory: String::new(),
            libraries: Vec::new(),
        }
    }

    /// What is chosen between two devices in one process, and in two.
    fn links(
        from: &Device,
        to: &Device,
        forced: Option<LinkKind>,
    ) -> [Result<(LinkKind, String), String>; 2] {
        ["p", "q"].map(|hub| {
            let end = |worker, hub, device| End { worker, host: "h", hub, device };
            choose(end("a", "p", from), end("b", hub, to), forced).map(|choice| (choice.kind, choice.why))
        })
    }

    fn chosen(from: &Device, to: &Device) -> [(LinkKind, String); 2] {
        links(from, to, None).map(Result::unwrap)
    }

    #[test]
    fn the_best_link_of_every_combination() {
        use LinkKind::{DeviceCopy, Loopback, Nccl, Tcp};
        let cpu = device("cpu", "", &[], false);
        let why = |kind, why: &str| (kind, why.to_owned());
        assert_eq!(chosen(&cpu, &cpu), [why(Loopback, "same process"), why(Tcp, "different processes")]);
        for nccl in [false, true] {
            let gpu = device("cuda:0", "G0", &["G0"], nccl);
            assert_eq!(
                chosen(&gpu, &cpu),
                [
                    why(Loopback, "same process, cpu is no GPU"),
                    why(Tcp, "different processes, cpu is no GPU")
                ]
            );
            assert_eq!(chosen(&cpu, &gpu), chosen(&gpu, &cpu));
            let [within, between] = chosen(&gpu, &gpu);
            assert_eq!(within, why(DeviceCopy, "same process, same GPU"));
            assert_eq!(between.0, Tcp, "NCCL refuses one GPU twice");
        }
        // Every combination of peer access and of NCCL between two GPUs.
        for (peers, from_nccl, to_nccl) in (0..8).map(|bits| (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0)) {
            let reachable: &[&str] = if peers { &["G0", "G1"] } else { &["G0"] };
            let from = device("cuda:0", "G0", reachable, from_nccl);
            let to = device("cuda:1", "G1", &["G1"], to_nccl);
            let [within, between] = chosen(&from, &to);
            let lacks = if from_nccl { "h/b" } else { "h/a" };
            let expected = match (peers, from_nccl && to_nccl) {
                (true, _) => why(DeviceCopy, "same process, peer access"),
                (false, true) => why(Nccl, "NCCL on both"),
                (false, false) => (
                    Loopback,
                    format!("same process, no peer access from cuda:0 to cuda:1, no NCCL on {lacks}"),
                ),
            };
            assert_eq!(within, expected);
            let expected = match from_nccl && to_nccl {
                true => why(Nccl, "NCCL on both"),
                false => (Tcp, format!("different processes, no NCCL on {lacks}")),
            };
            assert_eq!(between, expected);
        }
    }

    #[test]
    fn a_link_that_was_asked_for_is_taken_or_refused() {
        use LinkKind::{DeviceCopy, Loopback, Nccl, Tcp};
        let cpu = device("cpu", "", &[], false);
        let gpu = |number: u32, nccl| {
            let hardware = format!("G{number}");
            device(&format!("cuda:{number}"), &hardware, &[&hardware], nccl)
        };
        let (a, b) = (gpu(0, true), gpu(1, true));
        let asked = "asked for by --links".to_owned();
        let can = |from: &Device, to: &Device, kind| {
            links(from, to, Some(kind)).map(|link| match link {
                Ok((got, why)) => {
                    assert_eq!((got, &why), (kind, &asked));
                    String::new()
                }
                Err(why) => why,
            })
        };
        for (from, to) in [(&cpu, &cpu), (&cpu, &a), (&a, &cpu), (&a, &a), (&a, &b)] {
            assert_eq!(can(from, to, Tcp), ["", ""]);
            assert_eq!(can(from, to, Loopback), ["", "different processes"]);
        }
        assert_eq!(can(&a, &b, DeviceCopy), ["no peer access from cuda:0 to cuda:1", "different processes"]);
        assert_eq!(can(&a, &cpu, DeviceCopy), ["cpu is no GPU", "different processes"]);
        assert_eq!(can(&a, &a, DeviceCopy), ["", "different processes"]);
        assert_eq!(can(&a, &b, Nccl), ["", ""]);
        assert_eq!(can(&a, &a, Nccl), ["NCCL does not link a GPU with itself", ""]);
        assert_eq!(can(&a, &gpu(1, false), Nccl), ["no NCCL on h/b", "no NCCL on h/b"]);
        assert_eq!(can(&cpu, &a, Nccl), ["cpu is no GPU", "cpu is no GPU"]);
    }
}
