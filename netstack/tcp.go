package netstack

import (
	"fmt"
	"slices"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// TCP chooses among what gVisor's TCP can do. The zero value is what figures
// speak for; the other choices are there to be measured. BenchmarkTCP of
// cmd/internal/meshtest, MB/s over two nodes, one run on a busy machine:
//
//	                             as chosen  RACK  no SACK  cubic
//	clear, super-segments cut           75    83       60     71
//	0.1 % lost                          55    70       47     67
//	1 % lost, 1 ms                     8.1   8.8      7.4   12.0
//	1 % lost, 20 ms                   0.98  0.88     0.88   0.58
//	3 % late, 1 ms                     9.1  12.5     11.2    7.0
//	20 ms, 30 MB/s, short queue        5.1   3.7      5.5    3.2
//
// RACK gains where packets are lost one by one and loses where they queue; on the
// wire to the pod it takes a reader that waits for its CPU for loss, 15 to 20
// times a second, and gVisor has one choice for both legs.
type TCP struct {
	// RACK finds losses by the time that has passed (RFC 8985), and probes for
	// a lost tail.
	RACK bool
	// NoSACK does without selective acknowledgements.
	NoSACK bool
	// Pod and Network are the congestion controls of the two legs, "reno" or
	// "cubic". Default reno and reno.
	Pod, Network string
}

func (c TCP) withDefaults() TCP {
	if c.Pod == "" {
		c.Pod = "reno"
	}
	if c.Network == "" {
		c.Network = "reno"
	}
	return c
}

func (c TCP) validate() error {
	for _, name := range []string{c.Pod, c.Network} {
		if !slices.Contains([]string{"reno", "cubic"}, name) {
			return fmt.Errorf("netstack: there is no congestion control %q", name)
		}
	}
	return nil
}

// options are those of a stack.
func (c *TCP) options() []tcpip.SettableTransportProtocolOption {
	sack, recovery := tcpip.TCPSACKEnabled(!c.NoSACK), tcpip.TCPRecovery(0)
	if c.RACK {
		recovery = tcpip.TCPRACKLossDetection
	}
	control := tcpip.CongestionControlOption(c.Network)
	return []tcpip.SettableTransportProtocolOption{&sack, &recovery, &control}
}

// control sets what differs between the legs.
func (c *TCP) control(ep *tcp.Endpoint, pod bool) {
	if pod && c.Pod != c.Network {
		control := tcpip.CongestionControlOption(c.Pod)
		ep.SetSockOpt(&control)
	}
}
