package zds

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/ztun/ztun/cmd/internal/zds/zdsapi"
)

// What one message may hold. More is refused by both sides.
const (
	// MaxOlderFlows is the number of older flows that fit a message.
	MaxOlderFlows = 1024
	maxName       = 253 // A DNS name, as Kubernetes bounds its names.
	maxAddresses  = 64
	maxPorts      = 1024
	minMTU        = 576
)

// kind is which request a message is.
type kind uint8

const (
	kindAdd kind = iota + 1
	kindKeep
	kindDel
	kindSnapshotSent
	kindYield
)

func (k kind) String() string {
	return [...]string{"nothing", "add", "keep", "del", "snapshot sent", "yield"}[k]
}

// request is one message of the agent. Only workload.UID is set in a keep, a
// del and a yield, nothing in a snapshot sent.
type request struct {
	kind     kind
	workload Workload
	icmp     int // How many ICMP sockets follow the device of an add.
	// predecessor says that the socket to one comes last in an add.
	predecessor bool
	part        int  // Of the ports, in an add; 0: none is said.
	lend        bool // In a keep.
}

// files is how many descriptors come with r.
func (r request) files() int {
	switch {
	case r.kind == kindAdd && r.predecessor:
		return 2 + r.icmp
	case r.kind == kindAdd:
		return 1 + r.icmp
	case r.kind == kindYield:
		return 1
	}
	return 0
}

// portParts is how many parts the ephemeral ports have.
const portParts = 4

// hello is what a proxy says of itself. All but ztun's are the zero value.
type hello struct {
	ztun    bool
	started uint64 // Nanoseconds since boot.
	leaving bool
	part    int // Of the ports; 0: none was given.
}

func decodeHello(b []byte) (h hello, err error) {
	var m zdsapi.ZdsHello
	if err := proto.Unmarshal(b, &m); err != nil {
		return h, fmt.Errorf("zds: hello: %w", err)
	}
	if m.GetVersion() != zdsapi.Version_V1 {
		return h, fmt.Errorf("zds: hello: version %d is not %d", m.GetVersion(), zdsapi.Version_V1)
	}
	p := m.GetProxy()
	if p == nil {
		return h, nil
	}
	if p.GetPortPart() > portParts {
		return h, fmt.Errorf("zds: hello: part %d of the ports, of %d", p.GetPortPart(), portParts)
	}
	return hello{ztun: true, started: p.GetStarted(), leaving: p.GetLeaving(), part: int(p.GetPortPart())}, nil
}

func encodeHello(h hello) ([]byte, error) {
	m := &zdsapi.ZdsHello{Version: zdsapi.Version_V1}
	if h.ztun {
		m.Proxy = &zdsapi.Proxy{Started: h.started, Leaving: h.leaving, PortPart: uint32(h.part)}
	}
	return proto.Marshal(m)
}

// holding is what a proxy has of a pod. If it reads the device, that comes with
// so many ICMP sockets.
type holding struct {
	reads, yielded bool
	deviceID       string
	offload        bool
	icmp           int
}

// files is how many descriptors come with h.
func (h holding) files() int {
	if h.reads {
		return 1 + h.icmp
	}
	return 0
}

// response is an Ack. text: "" says that all is well.
type response struct {
	text    string
	holding holding
}

func decodeResponse(b []byte) (r response, err error) {
	var m zdsapi.WorkloadResponse
	if err := proto.Unmarshal(b, &m); err != nil {
		return r, fmt.Errorf("zds: response: %w", err)
	}
	if m.GetAck() == nil {
		return r, errors.New("zds: response: not an ack")
	}
	r.text = clip(m.GetAck().GetError())
	h := m.GetAck().GetHolding()
	switch {
	case !h.GetReads():
		r.holding.yielded = h.GetYielded()
	case h.GetYielded() || h.GetIcmpSockets() > MaxICMP || checkName("device id", h.GetDeviceId()) != nil:
		return r, fmt.Errorf("zds: response: a holding that cannot be: %v", h)
	default:
		r.holding = holding{reads: true, deviceID: h.GetDeviceId(), offload: h.GetOffload(), icmp: int(h.GetIcmpSockets())}
	}
	return r, nil
}

func encodeResponse(r response) ([]byte, error) {
	ack := &zdsapi.Ack{Error: clip(r.text)}
	if h := r.holding; h != (holding{}) {
		ack.Holding = &zdsapi.Holding{
			Reads: h.reads, Yielded: h.yielded, DeviceId: h.deviceID, Offload: h.offload, IcmpSockets: uint32(h.icmp),
		}
	}
	return proto.Marshal(&zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: ack}})
}

// clip makes a text fit what a stock agent reads, and fit to be logged.
func clip(text string) string {
	const room = maxReply - 16 // What protobuf puts around the text. A refusal has no holding.
	if len(text) > room {
		text = text[:room]
	}
	return strings.ToValidUTF8(text, "")
}

// Validate reports why w could not be told to a proxy.
func (w Workload) Validate() error {
	_, err := encodeRequest(request{kind: kindAdd, workload: w})
	return err
}

// encodeRequest refuses what decodeRequest would refuse.
func encodeRequest(r request) ([]byte, error) {
	var m zdsapi.WorkloadRequest
	switch w := r.workload; r.kind {
	case kindAdd:
		add := &zdsapi.AddWorkload{
			Uid:          w.UID,
			WorkloadInfo: &zdsapi.WorkloadInfo{Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount},
		}
		if w.Device != nil {
			add.Device = w.Device.proto()
			add.Device.IcmpSockets, add.Device.Predecessor, add.Device.PortPart = uint32(r.icmp), r.predecessor, uint32(r.part)
		}
		if got, err := fromAdd(add); err != nil {
			return nil, err
		} else if got.files() != r.files() {
			return nil, fmt.Errorf("zds: add: %d descriptors without a device", r.files())
		}
		m.Payload = &zdsapi.WorkloadRequest_Add{Add: add}
	case kindKeep:
		m.Payload = &zdsapi.WorkloadRequest_Keep{Keep: &zdsapi.KeepWorkload{Uid: w.UID, Lend: r.lend}}
	case kindDel:
		m.Payload = &zdsapi.WorkloadRequest_Del{Del: &zdsapi.DelWorkload{Uid: w.UID}}
	case kindYield:
		m.Payload = &zdsapi.WorkloadRequest_Yield{Yield: &zdsapi.YieldWorkload{Uid: w.UID}}
	case kindSnapshotSent:
		m.Payload = &zdsapi.WorkloadRequest_SnapshotSent{SnapshotSent: &zdsapi.SnapshotSent{}}
	default:
		return nil, fmt.Errorf("zds: encode request of kind %d", r.kind)
	}
	b, err := proto.Marshal(&m)
	if err == nil && len(b) > maxPacket {
		err = errTruncated
	}
	return b, err
}

// decodeRequest never panics, and allocates no more than a few times len(b).
func decodeRequest(b []byte) (request, error) {
	var m zdsapi.WorkloadRequest
	if err := proto.Unmarshal(b, &m); err != nil {
		return request{}, fmt.Errorf("zds: request: %w", err)
	}
	switch p := m.GetPayload().(type) {
	case *zdsapi.WorkloadRequest_Add:
		return fromAdd(p.Add)
	case *zdsapi.WorkloadRequest_Keep:
		r, err := uidOnly(kindKeep, p.Keep.GetUid())
		r.lend = p.Keep.GetLend()
		return r, err
	case *zdsapi.WorkloadRequest_Del:
		return uidOnly(kindDel, p.Del.GetUid())
	case *zdsapi.WorkloadRequest_Yield:
		return uidOnly(kindYield, p.Yield.GetUid())
	case *zdsapi.WorkloadRequest_SnapshotSent:
		return request{kind: kindSnapshotSent}, nil
	}
	return request{}, errors.New("zds: request: no payload that is known")
}

func uidOnly(k kind, uid string) (request, error) {
	return request{kind: k, workload: Workload{UID: uid}}, checkName("uid", uid)
}

func fromAdd(m *zdsapi.AddWorkload) (request, error) {
	r := request{kind: kindAdd, workload: Workload{UID: m.GetUid()}}
	info := m.GetWorkloadInfo()
	if info == nil {
		return r, errors.New("zds: add: no workload info")
	}
	w := &r.workload
	*w = Workload{UID: m.GetUid(), Name: info.GetName(), Namespace: info.GetNamespace(), ServiceAccount: info.GetServiceAccount()}
	err := errors.Join(checkName("uid", w.UID), checkName("name", w.Name),
		checkName("namespace", w.Namespace), checkName("service account", w.ServiceAccount))
	if err != nil || m.Device == nil {
		return r, err
	}
	w.Device, err = fromDevice(m.Device)
	r.icmp = int(min(m.Device.GetIcmpSockets(), MaxICMP))
	r.predecessor, r.part = m.Device.GetPredecessor(), int(min(m.Device.GetPortPart(), portParts))
	return r, err
}

// checkName keeps what will stand in logs and metrics short and printable.
func checkName(field, s string) error {
	if s == "" || len(s) > maxName {
		return fmt.Errorf("zds: %s of %d bytes is not in 1..%d", field, len(s), maxName)
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f {
			return fmt.Errorf("zds: %s %q is not printable ASCII", field, s)
		}
	}
	return nil
}

func (d *Device) proto() *zdsapi.Device {
	m := &zdsapi.Device{
		Id:                d.ID,
		Addresses:         addressBytes(d.Addresses),
		Mtu:               d.MTU,
		BypassInbound:     d.BypassInbound,
		DnsCapture:        d.DNSCapture,
		VirtualInterfaces: d.VirtualInterfaces,
		Offload:           d.Offload,
		NodeAddresses:     addressBytes(d.NodeAddresses),
	}
	for _, f := range d.OlderFlows {
		m.OlderFlows = append(m.OlderFlows, &zdsapi.Flow{
			LocalAddress: f.Local.Addr().AsSlice(), LocalPort: uint32(f.Local.Port()),
			RemoteAddress: f.Remote.Addr().AsSlice(), RemotePort: uint32(f.Remote.Port()),
		})
	}
	for _, p := range d.ProbePorts {
		m.ProbePorts = append(m.ProbePorts, uint32(p))
	}
	return m
}

func fromDevice(m *zdsapi.Device) (*Device, error) {
	switch {
	case len(m.GetId()) > maxName:
		return nil, fmt.Errorf("zds: device id of %d bytes", len(m.GetId()))
	case len(m.GetAddresses()) == 0 || len(m.GetAddresses()) > maxAddresses || len(m.GetNodeAddresses()) > maxAddresses:
		return nil, fmt.Errorf("zds: device with %d addresses and %d of the node", len(m.GetAddresses()), len(m.GetNodeAddresses()))
	case m.GetMtu() < minMTU || m.GetMtu() > math.MaxUint16:
		return nil, fmt.Errorf("zds: device MTU %d is not in %d..%d", m.GetMtu(), minMTU, math.MaxUint16)
	case len(m.GetOlderFlows()) > MaxOlderFlows:
		return nil, fmt.Errorf("zds: device with %d older flows, more than %d", len(m.GetOlderFlows()), MaxOlderFlows)
	case m.GetIcmpSockets() > MaxICMP:
		return nil, fmt.Errorf("zds: device with %d ICMP sockets, more than %d", m.GetIcmpSockets(), MaxICMP)
	case m.GetPortPart() > portParts:
		return nil, fmt.Errorf("zds: device with part %d of the ports, of %d", m.GetPortPart(), portParts)
	case len(m.GetProbePorts()) > maxPorts:
		return nil, fmt.Errorf("zds: device with %d probe ports, more than %d", len(m.GetProbePorts()), maxPorts)
	}
	d := &Device{
		ID:                m.GetId(),
		MTU:               m.GetMtu(),
		BypassInbound:     m.GetBypassInbound(),
		DNSCapture:        m.GetDnsCapture(),
		VirtualInterfaces: m.GetVirtualInterfaces(),
		Offload:           m.GetOffload(),
	}
	var errs [4]error
	d.Addresses, errs[0] = addresses(m.GetAddresses())
	d.NodeAddresses, errs[1] = addresses(m.GetNodeAddresses())
	for _, f := range m.GetOlderFlows() {
		local, err := addrPort(f.GetLocalAddress(), f.GetLocalPort())
		remote, err2 := addrPort(f.GetRemoteAddress(), f.GetRemotePort())
		if err := errors.Join(err, err2); err != nil {
			errs[2] = err
			break
		}
		d.OlderFlows = append(d.OlderFlows, Flow{Local: local, Remote: remote})
	}
	for _, p := range m.GetProbePorts() {
		if p == 0 || p > math.MaxUint16 {
			errs[3] = fmt.Errorf("zds: probe port %d", p)
			break
		}
		d.ProbePorts = append(d.ProbePorts, uint16(p))
	}
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	return d, nil
}

func addressBytes(addrs []netip.Addr) [][]byte {
	var out [][]byte
	for _, a := range addrs {
		out = append(out, a.Unmap().AsSlice())
	}
	return out
}

func addresses(list [][]byte) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, b := range list {
		a, ok := netip.AddrFromSlice(b)
		if !ok {
			return nil, fmt.Errorf("zds: an address of %d bytes", len(b))
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

func addrPort(b []byte, port uint32) (netip.AddrPort, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok || port == 0 || port > math.MaxUint16 {
		return netip.AddrPort{}, fmt.Errorf("zds: a flow's end of %d bytes and port %d", len(b), port)
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(port)), nil
}
