package telemetry

import (
	"cmp"
	"strconv"
	"time"

	"github.com/ztun/ztun/tunnel"
	"github.com/ztun/ztun/tunnel/identity"
	"github.com/ztun/ztun/xds/mesh"
)

// addRecord adds the fields of the access log in ztunnel's order. What is not
// known is left out. complete adds what only a connection that has ended has.
func addRecord(l *line, r *tunnel.Record, complete bool) {
	tls := r.MutualTLS()
	l.addr("src.addr", r.Src)
	addWorkload(l, &srcNames, r.SrcWorkload, r.SrcIdentity, tls)
	l.addr("dst.addr", r.Dst)
	if r.HBONEAddr != "" {
		l.bare("dst.hbone_addr", r.HBONEAddr)
	}
	if r.Service != nil {
		l.text("dst.service", r.Service.Hostname)
	}
	addWorkload(l, &dstNames, r.DstWorkload, r.DstIdentity, tls)
	l.text("direction", r.Direction.String())
	if !complete {
		return
	}
	l.number("bytes_sent", r.Sent)
	l.number("bytes_recv", r.Received)
	l.text("duration", strconv.FormatInt(int64(r.Duration/time.Millisecond), 10)+"ms")
	if text := r.Error(); text != "" {
		l.text("error", text)
	}
	if r.SameNode {
		l.text("path", "same-node") // Ours: no tunnel, the stream stayed in this process.
	}
}

type sideNames struct{ workload, namespace, identity, cluster string }

var (
	srcNames = sideNames{"src.workload", "src.namespace", "src.identity", "src.cluster"}
	dstNames = sideNames{"dst.workload", "dst.namespace", "dst.identity", "dst.cluster"}
)

func addWorkload(l *line, names *sideNames, w *mesh.Workload, id identity.ID, tls bool) {
	if w != nil {
		if name := cmp.Or(w.Name, w.CanonicalName); name != "" {
			l.text(names.workload, name)
		}
		if w.Namespace != "" {
			l.text(names.namespace, w.Namespace)
		}
	}
	if tls && !id.IsZero() {
		l.text(names.identity, id.String())
	}
	if w != nil && w.Cluster != "" {
		l.text(names.cluster, w.Cluster)
	}
}
