package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/ztun/ztun/cmd/internal/zds"
	"github.com/ztun/ztun/tun/podnet"
)

// maxUID bounds a pod's UID, which becomes the name of a file.
const maxUID = 128

// validate says everything that is wrong with p.
func (p *Pod) validate() error {
	var errs []error
	if !validUID(p.UID) {
		errs = append(errs, fmt.Errorf("agent: pod UID %q is not a name of up to %d letters, digits, '-', '_' and '.'", p.UID, maxUID))
	}
	if p.Netns == "" {
		errs = append(errs, errors.New("agent: pod without the path of its network namespace"))
	}
	cfg := podnet.Config{VirtualInterfaces: p.VirtualInterfaces}
	errs = append(errs, cfg.Validate(), p.workload(nil).Validate())
	return errors.Join(errs...)
}

func validUID(s string) bool {
	if s == "" || len(s) > maxUID || s[0] == '.' {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}

// String is namespace/name, for logs.
func (p *Pod) String() string { return p.Namespace + "/" + p.Name }

// equal reports whether both ask for the same.
func (p *Pod) equal(o *Pod) bool {
	return p.UID == o.UID && p.Name == o.Name && p.Namespace == o.Namespace && p.ServiceAccount == o.ServiceAccount &&
		p.Netns == o.Netns && p.BypassInbound == o.BypassInbound && p.DNSCapture == o.DNSCapture &&
		slices.Equal(p.Addresses, o.Addresses) && slices.Equal(p.VirtualInterfaces, o.VirtualInterfaces) &&
		slices.Equal(p.ProbePorts, o.ProbePorts)
}

// workload is p as a proxy is told of it. d is nil where only who it is counts.
func (p *Pod) workload(d *zds.Device) zds.Workload {
	return zds.Workload{UID: p.UID, Name: p.Name, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Device: d}
}

// device describes what podnet made of the pod to a proxy, but for Offload, which who opened the device knows.
func (p *Pod) device(id string, st *podnet.State, node []netip.Addr) *zds.Device {
	addrs := p.Addresses
	if len(addrs) == 0 {
		addrs = st.Addrs
	}
	d := &zds.Device{
		ID: id, Addresses: addrs, MTU: st.MTU,
		BypassInbound: p.BypassInbound, DNSCapture: p.DNSCapture, VirtualInterfaces: len(p.VirtualInterfaces) > 0,
		NodeAddresses: node, ProbePorts: p.ProbePorts,
	}
	for _, f := range st.Older {
		if len(d.OlderFlows) == zds.MaxOlderFlows {
			break
		}
		d.OlderFlows = append(d.OlderFlows, zds.Flow{Local: f.Local, Remote: f.Remote})
	}
	return d
}

// newDeviceID is unlike that of any other open device.
func newDeviceID() string { return rand.Text() }
