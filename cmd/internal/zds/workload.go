// Package zds is what the node agent and the node's proxies say to each other:
// which pods there are, and for each the descriptor of its TUN device.
//
// It is Istio's ztunnel discovery service: one protobuf message a packet on a
// unix seqpacket socket, each answered by one Ack. Three things differ. The
// descriptor is a TUN device, not a network namespace, AddWorkload says in
// fields of our own what the proxy needs to know of that device, and one proxy of
// ztun takes a pod over from another without a cut (handover.go).
//
// Client is the proxy's side, Server the agent's. Neither knows what a TUN
// device is. Both are safe for concurrent use.
package zds

import (
	"net/netip"
	"slices"
)

// A Workload is a pod as the agent describes it to a proxy.
type Workload struct {
	UID            string // The pod's UID in Kubernetes.
	Name           string
	Namespace      string
	ServiceAccount string
	// Device is nil from a stock agent, which sends a network namespace.
	Device *Device
}

// onDevice is w on the open device that old is about.
func (w Workload) onDevice(old Workload) Workload {
	if w.Device != nil && old.Device != nil {
		d := *w.Device
		d.ID, d.Offload = old.Device.ID, old.Device.Offload
		w.Device = &d
	}
	return w
}

// Equal reports whether two descriptions say the same, in the same order.
func (w Workload) Equal(o Workload) bool {
	if w.UID != o.UID || w.Name != o.Name || w.Namespace != o.Namespace || w.ServiceAccount != o.ServiceAccount {
		return false
	}
	if w.Device == nil || o.Device == nil {
		return w.Device == o.Device
	}
	return w.Device.Equal(*o.Device)
}

// sameDevice reports whether both are of one pod on the same open device, which is
// read in the same way.
func (w Workload) sameDevice(o Workload) bool {
	x, y := w.Device, o.Device
	return w.UID == o.UID && w.Name == o.Name && w.Namespace == o.Namespace && w.ServiceAccount == o.ServiceAccount &&
		x != nil && y != nil && x.ID != "" && x.ID == y.ID && x.MTU == y.MTU && x.Offload == y.Offload
}

// A Device says what the proxy must know of a pod's TUN device.
type Device struct {
	// ID is equal for two descriptors of the same open device, and unique
	// among those that an agent has opened. "" equals nothing.
	ID        string
	Addresses []netip.Addr
	MTU       uint32 // Bytes of an IP packet.
	// BypassInbound forwards plaintext inbound flows untouched.
	BypassInbound bool
	// DNSCapture says that the pod's UDP to port 53 arrives on the device.
	DNSCapture bool
	// VirtualInterfaces says that flows of others (of virtual machines in
	// the pod) arrive on the device too, and are outbound.
	VirtualInterfaces bool
	// OlderFlows were established when the pod was attached.
	OlderFlows []Flow
	// Offload says that packets carry a virtio header with offloads.
	Offload bool
	// NodeAddresses are the node's own; ProbePorts what the kubelet probes.
	NodeAddresses []netip.Addr
	ProbePorts    []uint16
	// PortPart is the part of the ephemeral ports that the proxy dials from, 1 to
	// 4, so that two that have flows of the pod never dial from the same; 0: any.
	// The Server sets it.
	PortPart int
}

// Equal reports whether both describe the same open device in the same way.
// The older flows do not count: they only ever become fewer.
func (d Device) Equal(o Device) bool {
	return d.ID != "" && d.ID == o.ID && d.MTU == o.MTU && d.BypassInbound == o.BypassInbound &&
		d.DNSCapture == o.DNSCapture && d.VirtualInterfaces == o.VirtualInterfaces && d.Offload == o.Offload &&
		slices.Equal(d.Addresses, o.Addresses) && slices.Equal(d.NodeAddresses, o.NodeAddresses) &&
		slices.Equal(d.ProbePorts, o.ProbePorts)
}

// A Flow is a TCP connection as the pod sees it.
type Flow struct{ Local, Remote netip.AddrPort }
