package podnet

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// TCP states (net/tcp_states.h).
const (
	tcpSynSent  = 2
	tcpTimeWait = 6
	tcpClose    = 7
	tcpListen   = 10
	tcpStates   = 12 // the last that a socket diagnosis knows to list
)

const (
	// sockID is where struct inet_diag_sockid stands in struct inet_diag_msg, and its length (linux/inet_diag.h).
	sockIDAt   = 4
	sockIDLen  = 48
	diagMsgLen = sockIDAt + sockIDLen + 20
)

// socket is a TCP socket of the pod, of any state but LISTEN and CLOSE.
type socket struct {
	Flow
	State uint8
	// family and id name it to the kernel.
	family uint8
	id     [sockIDLen]byte
}

// diagRequest is struct inet_diag_req_v2.
type diagRequest struct {
	family uint8
	states uint32
	id     [sockIDLen]byte
}

func (r *diagRequest) Len() int { return 8 + sockIDLen }

func (r *diagRequest) Serialize() []byte {
	b := []byte{r.family, unix.IPPROTO_TCP, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, r.states)
	return append(b, r.id[:]...)
}

// parseSocket reads struct inet_diag_msg.
func parseSocket(m []byte) (socket, error) {
	if len(m) < diagMsgLen {
		return socket{}, errShort
	}
	s := socket{family: m[0], State: m[1]}
	copy(s.id[:], m[sockIDAt:])
	addr := func(b []byte) netip.Addr {
		if s.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b))
		}
		return netip.AddrFrom16([16]byte(b)).Unmap()
	}
	if s.family != unix.AF_INET && s.family != unix.AF_INET6 {
		return socket{}, errShort
	}
	s.Local = netip.AddrPortFrom(addr(s.id[4:20]), networkOrder.Uint16(s.id[0:]))
	s.Remote = netip.AddrPortFrom(addr(s.id[20:36]), networkOrder.Uint16(s.id[2:]))
	s.Cookie = uint64(binary.NativeEndian.Uint32(s.id[40:])) | uint64(binary.NativeEndian.Uint32(s.id[44:]))<<32
	return s, nil
}

// flows lists the TCP sockets that have a remote end outside of the pod.
func (k *kernel) flows(ctx context.Context, w *world) (list []socket, err error) {
	states := uint32(1<<(tcpStates+1)-1) &^ (1<<tcpListen | 1<<tcpClose)
	for _, family := range w.families {
		var part []socket
		err := k.dump(ctx, unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY,
			func(req *nl.NetlinkRequest) { req.AddData(&diagRequest{family: family, states: states}) },
			func() { part = nil },
			func(m []byte) error {
				s, err := parseSocket(m)
				if err == nil && !s.Remote.Addr().IsUnspecified() && !w.isLocal(s.Remote.Addr().WithZone("")) {
					part = append(part, s)
				}
				return err
			})
		if err != nil {
			return nil, fmt.Errorf("podnet: list IPv%d sockets: %w", familyVersion(family), err)
		}
		list = append(list, part...)
	}
	return list, nil
}

// olderFlows are those of a fresh namespace. A flow that is only asked for (SYN_SENT) will be asked for again, and be captured.
func olderFlows(sockets []socket) []Flow {
	var out []Flow
	for _, s := range sockets {
		if s.State != tcpSynSent {
			out = append(out, s.Flow)
		}
	}
	return out
}

// stillThere are the flows of an earlier list that have the same socket still.
func stillThere(older []Flow, sockets []socket) []Flow {
	var out []Flow
	for _, s := range sockets {
		if slices.Contains(older, s.Flow) {
			out = append(out, s.Flow)
		}
	}
	return out
}

// destroy ends a socket: the app sees ECONNABORTED, the reset that the kernel sends is captured.
func (k *kernel) destroy(ctx context.Context, s socket) error {
	if k.denyDestroy != nil {
		return k.denyDestroy()
	}
	err := k.request(ctx, unix.NETLINK_INET_DIAG, nl.SOCK_DESTROY, unix.NLM_F_ACK, func(req *nl.NetlinkRequest) {
		req.AddData(&diagRequest{family: s.family, id: s.id})
	}, nil)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) {
		return nil // ended by itself
	}
	return err
}

// destroyFlows ends every flow that is not in the older list and waits until a dump shows none. Where the kernel cannot
// destroy sockets it waits for them to end.
func (k *kernel) destroyFlows(ctx context.Context, w *world, older []Flow) error {
	unsupported := false
	var left []Flow
	for pause := time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		if ctx.Err() != nil && len(left) > 0 {
			return &SocketsError{Left: left, Unsupported: unsupported}
		}
		sockets, err := k.flows(ctx, w)
		if err != nil {
			return err
		}
		left = nil
		for _, s := range sockets {
			if slices.Contains(older, s.Flow) {
				continue
			}
			err := k.destroy(ctx, s)
			switch {
			case errors.Is(err, unix.EOPNOTSUPP) && s.State == tcpTimeWait:
				continue // before 5.19; has nothing to send
			case errors.Is(err, unix.EOPNOTSUPP):
				unsupported = true
			case err != nil:
				return fmt.Errorf("podnet: destroy socket %v to %v: %w", s.Local, s.Remote, err)
			}
			left = append(left, s.Flow)
		}
		if len(left) == 0 {
			return nil
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}
