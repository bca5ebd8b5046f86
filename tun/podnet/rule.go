package podnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rule is a policy rule, comparable. Family is unix.AF_INET or AF_INET6.
type rule struct {
	Family   uint8
	Priority uint32
	Src, Dst netip.Prefix // zero: any
	Iif, Oif string
	IPProto  uint8
	DPort    uint16 // a range of one
	Action   uint8  // nl.FR_ACT_*
	Table    uint32 // of FR_ACT_TO_TBL
	// Protocol says who made it (rtm_protocol); not part of what it does.
	Protocol uint8
	// Other is set when it has a selector that we never use.
	Other bool
}

// key is what the rule does, whoever made it.
func (r rule) key() rule {
	r.Protocol = 0
	return r
}

// isLocal tells whether the rule is "lookup local" for everything.
func (r rule) isLocal() bool {
	return r.key() == rule{Family: r.Family, Priority: r.Priority, Action: nl.FR_ACT_TO_TBL, Table: unix.RT_TABLE_LOCAL}
}

var actionNames = map[uint8]string{nl.FR_ACT_BLACKHOLE: "blackhole", nl.FR_ACT_UNREACHABLE: "unreachable", nl.FR_ACT_PROHIBIT: "prohibit"}

func (r rule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "IPv%d rule %d:", familyVersion(r.Family), r.Priority)
	say := func(word string, value any, set bool) {
		if set {
			fmt.Fprintf(&b, " %s %v", word, value)
		}
	}
	say("from", r.Src, r.Src.IsValid())
	say("to", r.Dst, r.Dst.IsValid())
	say("iif", r.Iif, r.Iif != "")
	say("oif", r.Oif, r.Oif != "")
	say("ipproto", r.IPProto, r.IPProto != 0)
	say("dport", r.DPort, r.DPort != 0)
	say("and", "more", r.Other)
	if name := actionNames[r.Action]; name != "" {
		b.WriteString(" " + name)
	} else {
		fmt.Fprintf(&b, " lookup %d", r.Table)
	}
	return b.String()
}

func familyVersion(family uint8) int {
	if family == unix.AF_INET6 {
		return 6
	}
	return 4
}

// encode fills a RTM_NEWRULE or RTM_DELRULE request.
func (r rule) encode(req *nl.NetlinkRequest) {
	msg := &nl.RtMsg{RtMsg: unix.RtMsg{Family: r.Family, Type: r.Action, Table: unix.RT_TABLE_UNSPEC}}
	req.AddData(msg)
	add := func(attr int, b []byte) { req.AddData(nl.NewRtAttr(attr, b)) }
	add(nl.FRA_PRIORITY, nl.Uint32Attr(r.Priority))
	add(nl.FRA_PROTOCOL, []byte{r.Protocol})
	if r.Src.IsValid() {
		msg.Src_len = uint8(r.Src.Bits())
		add(nl.FRA_SRC, r.Src.Addr().AsSlice())
	}
	if r.Dst.IsValid() {
		msg.Dst_len = uint8(r.Dst.Bits())
		add(nl.FRA_DST, r.Dst.Addr().AsSlice())
	}
	if r.Iif != "" {
		add(nl.FRA_IIFNAME, append([]byte(r.Iif), 0))
	}
	if r.Oif != "" {
		add(nl.FRA_OIFNAME, append([]byte(r.Oif), 0))
	}
	if r.IPProto != 0 {
		add(nl.FRA_IP_PROTO, []byte{r.IPProto})
	}
	if r.DPort != 0 {
		b := binary.NativeEndian.AppendUint16(nil, r.DPort)
		add(nl.FRA_DPORT_RANGE, binary.NativeEndian.AppendUint16(b, r.DPort))
	}
	if r.Action == nl.FR_ACT_TO_TBL {
		if r.Table < 256 {
			msg.Table = uint8(r.Table)
		}
		add(nl.FRA_TABLE, nl.Uint32Attr(r.Table))
	}
}

// parseRule reads a RTM_NEWRULE message without its header.
func parseRule(m []byte) (rule, error) {
	if len(m) < unix.SizeofRtMsg {
		return rule{}, errShort
	}
	msg := nl.DeserializeRtMsg(m)
	r := rule{Family: msg.Family, Action: msg.Type, Table: uint32(msg.Table)}
	// Invert, and a type of service: selectors of others.
	r.Other = msg.Flags&invertRule != 0 || msg.Tos != 0
	err := eachAttr(m[unix.SizeofRtMsg:], func(attr uint16, v []byte) bool {
		ok := true
		switch attr {
		case nl.FRA_PRIORITY:
			r.Priority, ok = attr32(v)
		case nl.FRA_TABLE:
			r.Table, ok = attr32(v)
		case nl.FRA_SRC:
			r.Src, ok = attrPrefix(v, msg.Src_len)
		case nl.FRA_DST:
			r.Dst, ok = attrPrefix(v, msg.Dst_len)
		case nl.FRA_IIFNAME:
			r.Iif = unix.ByteSliceToString(v)
		case nl.FRA_OIFNAME:
			r.Oif = unix.ByteSliceToString(v)
		case nl.FRA_IP_PROTO:
			if ok = len(v) == 1; ok {
				r.IPProto = v[0]
			}
		case nl.FRA_PROTOCOL:
			if ok = len(v) == 1; ok {
				r.Protocol = v[0]
			}
		case nl.FRA_DPORT_RANGE:
			if ok = len(v) == 4; ok {
				r.DPort = binary.NativeEndian.Uint16(v)
				r.Other = r.Other || binary.NativeEndian.Uint16(v[2:]) != r.DPort
			}
		case nl.FRA_SUPPRESS_PREFIXLEN, nl.FRA_SUPPRESS_IFGROUP:
			n, valid := attr32(v)
			r.Other = r.Other || n != ^uint32(0)
			ok = valid
		case fraDPortMask:
			r.Other = r.Other || len(v) != 2 || binary.NativeEndian.Uint16(v) != 0xffff
		case nl.FRA_PAD:
		default:
			r.Other = true
		}
		return ok
	})
	if r.Action != nl.FR_ACT_TO_TBL {
		r.Table = 0
	}
	return r, err
}

// Of linux/fib_rules.h. Since 6.15 a single port is listed with its mask.
const (
	invertRule   = 2
	fraDPortMask = 29
)
