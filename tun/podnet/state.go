package podnet

import (
	"net/netip"
	"slices"
)

// stateVersion changes when an older State would be misread.
const stateVersion = 1

// State is what an Attachment knows and the kernel does not: keep it, as JSON, across restarts of the agent.
type State struct {
	Version int    `json:"version"`
	Device  string `json:"device"`
	// Boot and Netns name the namespace: the boot id, and the kernel's cookie of the namespace (0: unknown).
	Boot  string `json:"boot"`
	Netns uint64 `json:"netns"`

	CaptureDNS        bool     `json:"captureDNS,omitempty"`
	BypassInbound     bool     `json:"bypassInbound,omitempty"`
	VirtualInterfaces []string `json:"virtualInterfaces,omitempty"`

	Addrs []netip.Addr `json:"addrs,omitempty"`
	MTU   uint32       `json:"mtu,omitempty"`
	// Older are the flows that are older than capture.
	Older []Flow `json:"older,omitempty"`
	// Sysctls are the values found before they were changed, in the order in which they were changed.
	Sysctls []SavedSysctl `json:"sysctls,omitempty"`
}

// SavedSysctl is a sysctl as it was before Attach.
type SavedSysctl struct {
	// Path is relative to /proc/sys.
	Path string `json:"path"`
	Old  string `json:"old"`
	// New is what it was set to. Empty: it was not changed, only noted.
	New string `json:"new,omitempty"`
}

func (st *State) clone() State {
	c := *st
	c.VirtualInterfaces = slices.Clone(st.VirtualInterfaces)
	c.Addrs = slices.Clone(st.Addrs)
	c.Older = slices.Clone(st.Older)
	c.Sysctls = slices.Clone(st.Sysctls)
	return c
}
