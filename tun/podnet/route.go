package podnet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// route is an entry of a routing table, comparable. What we never use is left out.
type route struct {
	Family uint8
	Table  uint32
	Dst    netip.Prefix // valid, default is /0
	Type   uint8        // unix.RTN_*
	Oif    int          // 0 for types that have none
	Src    netip.Addr   // zero: none
	Metric uint32
	Scope  uint8
	// Gw and Protocol are read from routes of others. Dead says that the kernel does not use it.
	Gw       netip.Addr
	Protocol uint8
	Dead     bool
}

// slot is what makes two routes the same one to NLM_F_REPLACE.
type slot struct {
	Family uint8
	Table  uint32
	Dst    netip.Prefix
	Metric uint32
}

func (r route) slot() slot { return slot{r.Family, r.Table, r.Dst, r.Metric} }

var routeTypes = map[uint8]string{unix.RTN_LOCAL: "local ", unix.RTN_UNREACHABLE: "unreachable ", unix.RTN_BLACKHOLE: "blackhole "}

func (r route) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "IPv%d route %s%v", familyVersion(r.Family), routeTypes[r.Type], r.Dst)
	if r.Gw.IsValid() {
		fmt.Fprintf(&b, " via %v", r.Gw)
	}
	if r.Oif != 0 {
		fmt.Fprintf(&b, " dev #%d", r.Oif)
	}
	if r.Src.IsValid() {
		fmt.Fprintf(&b, " src %v", r.Src)
	}
	fmt.Fprintf(&b, " metric %d table %d", r.Metric, r.Table)
	return b.String()
}

func (r route) encode(req *nl.NetlinkRequest) {
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{
		Family: r.Family, Dst_len: uint8(r.Dst.Bits()), Type: r.Type, Scope: r.Scope, Protocol: r.Protocol,
	}}
	req.AddData(msg)
	add := func(attr int, b []byte) { req.AddData(nl.NewRtAttr(attr, b)) }
	add(unix.RTA_TABLE, nl.Uint32Attr(r.Table))
	add(unix.RTA_PRIORITY, nl.Uint32Attr(r.Metric))
	if r.Dst.Bits() > 0 {
		add(unix.RTA_DST, r.Dst.Addr().AsSlice())
	}
	if r.Oif != 0 {
		add(unix.RTA_OIF, nl.Uint32Attr(uint32(r.Oif)))
	}
	if r.Src.IsValid() {
		add(unix.RTA_PREFSRC, r.Src.AsSlice())
	}
	if r.Gw.IsValid() {
		add(unix.RTA_GATEWAY, r.Gw.AsSlice())
	}
}

// parseRoute reads a RTM_NEWROUTE message without its header. Of several next hops it takes the first.
func parseRoute(m []byte) (route, error) {
	if len(m) < unix.SizeofRtMsg {
		return route{}, errShort
	}
	msg := nl.DeserializeRtMsg(m)
	r := route{Family: msg.Family, Table: uint32(msg.Table), Type: msg.Type, Scope: msg.Scope, Protocol: msg.Protocol}
	r.Dead = msg.Flags&unix.RTNH_F_DEAD != 0 || msg.Flags&unix.RTM_F_CLONED != 0
	any4, any6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	r.Dst = any4
	if r.Family == unix.AF_INET6 {
		r.Dst = any6
	}
	var single func(attr uint16, v []byte) bool
	single = func(attr uint16, v []byte) bool {
		ok := true
		switch attr {
		case unix.RTA_DST:
			r.Dst, ok = attrPrefix(v, msg.Dst_len)
		case unix.RTA_TABLE:
			r.Table, ok = attr32(v)
		case unix.RTA_PRIORITY:
			r.Metric, ok = attr32(v)
		case unix.RTA_OIF:
			var n uint32
			n, ok = attr32(v)
			r.Oif = int(n)
		case unix.RTA_PREFSRC:
			r.Src, ok = netip.AddrFromSlice(v)
		case unix.RTA_GATEWAY:
			r.Gw, ok = netip.AddrFromSlice(v)
		case unix.RTA_MULTIPATH:
			if ok = len(v) >= unix.SizeofRtNexthop; !ok {
				break
			}
			n := int(binary.NativeEndian.Uint16(v))
			if ok = n >= unix.SizeofRtNexthop && n <= len(v); ok {
				r.Oif = int(binary.NativeEndian.Uint32(v[4:]))
				ok = eachAttr(v[unix.SizeofRtNexthop:n], func(a uint16, v []byte) bool {
					return a == unix.RTA_MULTIPATH || single(a, v)
				}) == nil
			}
		}
		return ok
	}
	err := eachAttr(m[unix.SizeofRtMsg:], single)
	if r.Type != unix.RTN_UNICAST && r.Type != unix.RTN_LOCAL {
		r.Oif = 0 // IPv6 names the loopback device there
	}
	return r, err
}

var errShort = errors.New("podnet: malformed netlink message")

// eachAttr calls f for each attribute until it returns false, which makes the message malformed.
func eachAttr(b []byte, f func(attr uint16, value []byte) bool) error {
	for len(b) >= unix.SizeofRtAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtAttr || n > len(b) {
			return errShort
		}
		if !f(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[unix.SizeofRtAttr:n]) {
			return errShort
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return nil
}

func attr32(v []byte) (uint32, bool) {
	if len(v) != 4 {
		return 0, false
	}
	return binary.NativeEndian.Uint32(v), true
}

func attrPrefix(v []byte, bits uint8) (netip.Prefix, bool) {
	a, ok := netip.AddrFromSlice(v)
	if !ok || int(bits) > a.BitLen() {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, int(bits)), true
}
