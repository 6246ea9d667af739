
import sys,re,collections,time
from probe import comp
from ladder_kernels.gpu import nf4
import fnmatch
for sp in nf4.specs():
    if not fnmatch.fnmatch(sp.name, sys.argv[1]): continue
    for cc in map(int, sys.argv[2].split(",")):
        t=time.time(); k,u,d=comp(sp.kernel, sp.types, dict(sp.constants), cc, sp.num_warps); t=time.time()-t
        ins=[m[1] for l in d.splitlines() if (m:=re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);",l))]
        mix=collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", t).split()[0] for t in ins if "NOP" not in t)
        r=re.search(r"REG:(\d+) STACK:(\d+)",u).groups()
        print(sp.name, cc, "reg",r, k.metadata.shared, sum(mix.values()), round(t,1), dict(mix.most_common(16)) if len(sys.argv)>3 else "", {k:v for k,v in mix.items() if "ST" in k[:3] or "LD" in k[:3] or 'MUFU' in k or 'FTZ' in k or "CALL" in k})
        if len(sys.argv)>4: print("\n".join(ins))
