// Package podnet puts a pod's network namespace behind a TUN device, and takes it away again.
//
// Attach makes the device, policy rules, two routing tables and a few sysctls inside the namespace, reads all of
// it back, and lists the TCP flows that are older. From then on every TCP segment of the pod that is not loopback's,
// in either direction, crosses the device; without a reader it goes nowhere. Watch repairs what others undo. Detach destroys the
// sockets of proxied flows, so that no segment of theirs leaves in plain text, and leaves no trace.
//
//	ns, err := podnet.OpenNetns("/proc/4711/ns/net")
//	a, err := podnet.Attach(ctx, ns, podnet.Config{CaptureDNS: true}, nil)
//	// hand a.File to the proxy, keep a.State() across restarts
//	go a.Watch(ctx)
//	err = podnet.Detach(ctx, ns, a.State(), resetProxied)
//
// What it does not do: anything in the host's namespace, iptables, nftables, eBPF, or reading a packet. An Attachment holds the
// namespace alive (as does its File), so close both when the pod is gone. Its methods may be called from any
// goroutine. Attach, Resume and Detach of one namespace must not run at the same time; different namespaces are independent.
package podnet

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"
)

// DefaultDevice is the name of the TUN device in every pod.
const DefaultDevice = "ztun0"

// ErrGone says that the namespace no longer exists. Whatever was in it is gone too.
var ErrGone = errors.New("podnet: network namespace is gone")

// Config says how a pod is captured.
type Config struct {
	// Device is the name of the TUN device. Default DefaultDevice.
	Device string
	// CaptureDNS sends the pod's UDP port 53 through the device too.
	CaptureDNS bool
	// BypassInbound is only recorded: inbound plaintext is captured as ever and forwarded by the proxy.
	BypassInbound bool
	// VirtualInterfaces names interfaces of the pod (a bridge to virtual machines) whose incoming TCP counts as the pod's own
	// outbound traffic. They need not exist yet.
	VirtualInterfaces []string
	// Recheck is how often Watch reads everything back without being told of a change. Default 10 s.
	Recheck time.Duration
	// OnChange, if set, is called by Watch, on its goroutine, when what the proxy must know, or the State, has changed.
	OnChange func(Change)
	// Logger is told of repairs. Default: none.
	Logger *slog.Logger
}

// Change is what Watch found different from what the proxy was told.
type Change struct {
	// File is set when the device had to be made anew; the callee owns it. The descriptors of the old one are dead.
	File    *os.File
	Offload bool
	Addrs   []netip.Addr
	MTU     uint32
}

// Flow is a TCP flow of the pod that is older than capture.
type Flow struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
	// Cookie is the kernel's name of the socket, which no later socket has.
	Cookie uint64 `json:"cookie"`
}

// Stats counts what an Attachment did since it was made.
type Stats struct {
	// Checks is how often everything was read back.
	Checks uint64 `json:"checks"`
	// Repairs by what was repaired: "rule", "route", "sysctl", "link", "device".
	Repairs map[string]uint64 `json:"repairs"`
	// Failures counts checks or repairs that ended with an error.
	Failures uint64 `json:"failures"`
	// Foreign is how many policy rules of others stand before the capture rules now, and may divert traffic from it.
	Foreign int `json:"foreign"`
}

// CollisionError says that something of somebody else's stands where a rule or table of ours belongs.
type CollisionError struct {
	What string
}

func (e *CollisionError) Error() string {
	return fmt.Sprintf("podnet: the namespace already has %s", e.What)
}

// DriftError lists the differences between what the namespace should have and what was read back.
type DriftError struct {
	Differences []string
}

func (e *DriftError) Error() string {
	return fmt.Sprintf("podnet: %d differences in the namespace, first: %s", len(e.Differences), e.Differences[0])
}

// SocketsError says that proxied TCP sockets are left, so that capture was not ended: their next segment would
// leave in plain text.
type SocketsError struct {
	Left []Flow
	// Unsupported is set where the kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY).
	Unsupported bool
}

func (e *SocketsError) Error() string {
	why := "do not end"
	if e.Unsupported {
		why = "must end by themselves, as this kernel cannot destroy them"
	}
	return fmt.Sprintf("podnet: capture stays: %d proxied sockets %s (one is %v to %v)", len(e.Left), why, e.Left[0].Local, e.Left[0].Remote)
}
